"""The bundled network: MatchSeg's idea with a label-transfer prior, in one file read top to bottom.

One encoder is shared by query and references (MatchSeg, arXiv 2403.15901). Three paths lead from
the references' masks to the query's: the *vote* (every query position takes the weighted vote of
similar reference positions, in feature and place), *joint attention* at stride 16 between query
tokens and mask-conditioned reference tokens, and *prototypes*, the mean fine features inside and
outside a mask, which carry what is thinner than the vote's grid. A decoder with skips refines the
vote, label by label in one batch; labels and background then compete.

Dimensions: B queries, R references, L labels, S working size, P = (S/8)^2, T = (S/16)^2.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOTE_EPSILON = 1e-3
VOTE_ROWS = 128  # of the vote's scores at once: 4 MB for 8 references
VOTE_FLOOR = 0.01  # of a vote that is judged: one cell alone must not decide
AROUND, MOST_CELLS = 9, 96  # cells of the vote's grid that a vote is judged on
FINE4, FINE2 = 32, 16  # channels of the fine maps at strides 4 and 2


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network, saved beside the weights.

    Attributes:
        size: side of the square working grid in pixels, a multiple of 32.
        tokens: width of the joint attention.
        layers: joint attention layers on the query's side.
        heads: attention heads.
        vote_heads: learned vote heads beside the one on raw descriptors.
        vote_dim: width of a learned vote head.
        width: decoder channels at stride 8.
    """

    size: int = 256
    tokens: int = 96
    layers: int = 2
    heads: int = 4
    vote_heads: int = 2
    vote_dim: int = 48
    width: int = 64


class ConvAct(nn.Sequential):
    """Convolution with TensorFlow's padding (bottom and right only at stride 2), then ReLU6."""

    def __init__(self, c_in: int, c_out: int, *, kernel: int, stride: int = 1, groups: int = 1):
        padding = 0 if stride == 2 else kernel // 2
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups)
        layers: list[nn.Module] = [conv, nn.ReLU6()]
        if stride == 2:
            layers.insert(0, nn.ZeroPad2d((0, 1, 0, 1)))
        super().__init__(*layers)


class InvertedResidual(nn.Module):
    """MobileNetV2's block (arXiv 1801.04381, figure 4), batch norm folded into the convolutions."""

    def __init__(self, c_in: int, c_out: int, *, stride: int, expand: int):
        super().__init__()
        hidden = c_in * expand
        self.residual = stride == 1 and c_in == c_out
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(ConvAct(c_in, hidden, kernel=1))
        layers.append(ConvAct(hidden, hidden, kernel=3, stride=stride, groups=hidden))
        layers.append(nn.Conv2d(hidden, c_out, 1))
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h / stride, w / stride)."""
        return x + self.body(x) if self.residual else self.body(x)


class Encoder(nn.Module):
    """MobileNetV2's feature part: maps at strides 2 to 32 with 16, 24, 32, 96, 320 channels."""

    PLAN = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    TAPS = (0, 2, 5, 12, 16)  # blocks whose output is kept

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvAct(3, 32, kernel=3, stride=2)
        blocks: list[nn.Module] = []
        channels = 32
        for expand, c_out, repeats, stride in self.PLAN:
            for i in range(repeats):
                block = InvertedResidual(
                    channels, c_out, stride=stride if i == 0 else 1, expand=expand
                )
                blocks.append(block)
                channels = c_out
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, S, S) in -1..1 -> five maps, finest first."""
        x = self.stem(images)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.TAPS:
                maps.append(x)
        return maps


class ResBlock(nn.Module):
    """Two 3x3 convolutions with group norm and a skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(8, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return F.gelu(x + self.body(x))


class Attention(nn.Module):
    """Pre-norm multi-head attention with residual; keys may be weighted or masked."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_q = nn.LayerNorm(width)
        self.norm_k = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), context (B, M, C), mask (B, M) added to the keys' scores -> (B, N, C)."""
        q = self.q(self.norm_q(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.kv(self.norm_k(context)).unflatten(-1, (2, self.heads, -1))
        k, v = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
        added = None if mask is None else mask[:, None, None, :].to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        return x + self.out(attended.transpose(1, 2).flatten(-2))


class FeedForward(nn.Sequential):
    """Pre-norm two-layer perceptron; the caller adds the residual."""

    def __init__(self, width: int):
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )


def grid(side: int, device: torch.device) -> Tensor:
    """Centers of a side x side grid, (side^2, 2) as (x, y) in -1..1, row by row."""
    line = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) * (2 / side) - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


def place_code(side: int, width: int, device: torch.device) -> Tensor:
    """Sine code of the place, (side^2, width): the same place has the same code at any size."""
    frequencies = torch.pi * 2 ** torch.linspace(-1, 3, width // 4, device=device)
    angles = (grid(side, device)[:, :, None] * frequencies).flatten(1)  # (P, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Maps of B images. descriptor (B, 152, S/8, S/8) has unit length over channels."""

    descriptor: Tensor
    tokens: Tensor  # (B, T, C)
    fine4: Tensor  # (B, 32, S/4, S/4)
    fine2: Tensor  # (B, 16, S/2, S/2)


@dataclass(frozen=True, eq=False)
class Remembered:
    """What R references give, for L labels: the parts of a memory.

    descriptor (R, P, 152); mask8 (R, L, P) share of the label in each cell; tokens (R, L, T, C);
    sums4 (R, L, 2, 33) and sums2 (R, L, 2, 17): sums of fine features inside and outside the mask,
    the last channel is the count.
    """

    descriptor: Tensor
    mask8: Tensor
    tokens: Tensor
    sums4: Tensor
    sums2: Tensor


@dataclass(frozen=True, eq=False)
class Output:
    """What the network says of B queries.

    scores (B, L, S, S): a label wins where positive and highest; votes (B, H, L + 1, S/8, S/8) are
    probabilities per head, background last; vote_scores (B, L, S/8, S/8) the mixed vote's
    log-odds against background; presence and quality (B, L) are logits.
    """

    scores: Tensor
    votes: Tensor
    vote_scores: Tensor
    presence: Tensor
    quality: Tensor


class MatchSegNet(nn.Module):
    """The whole network; `encode`, `remember`, `segment` are the three steps of the protocol."""

    DESCRIPTOR = 24 + 32 + 96

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        c, heads, width = config.tokens, config.heads, config.width
        self.encoder = Encoder()
        self.token16 = nn.Linear(96, c)
        self.token32 = nn.Conv2d(320, c, 1)
        self.fine4 = nn.Conv2d(24 + 64, FINE4, 1)
        self.fine2 = nn.Conv2d(16 + 12, FINE2, 1)
        # The vote: head 0 on raw descriptors, the others on learned projections of them.
        self.project = nn.Linear(self.DESCRIPTOR, config.vote_heads * config.vote_dim, bias=False)
        nn.init.orthogonal_(self.project.weight)
        n_votes = 1 + config.vote_heads
        self.log_tau = nn.Parameter(torch.full((n_votes,), 40.0).log())
        start = torch.linspace(-0.5, 1.5, n_votes).exp() * 0.3
        self.place_weight = nn.Parameter(start.log())
        self.mix = nn.Sequential(
            nn.Conv2d(2 * n_votes + self.DESCRIPTOR, 32, 1), nn.GELU(), nn.Conv2d(32, n_votes, 1)
        )
        # Joint attention: references look at themselves once (cacheable), queries twice at both.
        self.mask_token = nn.Linear(2, c)
        self.reference_attention = Attention(c, heads)
        self.reference_mlp = FeedForward(c)
        self.vote_token = nn.Linear(n_votes + 2, c)
        self.self_attention = nn.ModuleList(Attention(c, heads) for _ in range(config.layers))
        self.cross_attention = nn.ModuleList(Attention(c, heads) for _ in range(config.layers))
        self.mlp = nn.ModuleList(FeedForward(c) for _ in range(config.layers))
        # Decoder.
        self.enter8 = nn.Conv2d(self.DESCRIPTOR, width, 1)
        self.condition8 = nn.Conv2d(c + n_votes + 2, width, 1)
        self.block8 = nn.Sequential(ResBlock(width), ResBlock(width))
        self.to4 = nn.Conv2d(width, 40, 1)
        self.skip4 = nn.Conv2d(3 * FINE4, 40, 1)
        self.block4 = ResBlock(40)
        self.to2 = nn.Conv2d(40, 24, 1)
        self.skip2 = nn.Conv2d(3 * FINE2, 24, 1)
        self.block2 = ResBlock(24)
        self.head = nn.Conv2d(24, 4, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.vote_gain = nn.Parameter(torch.ones(()))
        self.judge = nn.Sequential(
            nn.Linear(2 * c + 2 * width + 2, 64), nn.GELU(), nn.Linear(64, 2)
        )
        # How much more a similar reference counts: in the vote, in the attention.
        self.log_trust = nn.Parameter(torch.full((2,), 20.0).log())

    # ---- step 1 ------------------------------------------------------------------------------
    def encode(self, images: Tensor) -> Encoded:
        """Standardized images (B, 3, S, S), about -2..2 -> maps of all levels."""
        m2, m4, m8, m16, m32 = self.encoder(images)
        parts = (
            F.avg_pool2d(F.normalize(m4, dim=1), 2),
            F.normalize(m8, dim=1),
            F.interpolate(F.normalize(m16, dim=1), scale_factor=2, mode="bilinear"),
        )
        descriptor = F.normalize(
            torch.cat([F.normalize(p.float(), dim=1) for p in parts], 1), dim=1
        )
        deep = F.interpolate(self.token32(m32), scale_factor=2, mode="bilinear")
        tokens = self.token16(m16.flatten(2).transpose(1, 2)) + deep.flatten(2).transpose(1, 2)
        fine4 = self.fine4(torch.cat([m4, F.pixel_unshuffle(m2, 2)], 1))
        fine2 = self.fine2(torch.cat([m2, F.pixel_unshuffle(images.to(m2.dtype), 2)], 1))
        return Encoded(descriptor, tokens, fine4, fine2)

    # ---- step 2 ------------------------------------------------------------------------------
    def remember(self, encoded: Encoded, masks: Tensor) -> Remembered:
        """Encoded R images and masks (R, L, S, S) as 0/1 floats -> memories."""
        n_labels = masks.shape[1]
        mask8 = F.avg_pool2d(masks, 8)
        mask16 = F.avg_pool2d(mask8, 2).flatten(2)  # (R, L, T)
        side = masks.shape[-1] // 16
        place = place_code(side, self.config.tokens, masks.device)
        tokens = (encoded.tokens + place)[:, None] + self.mask_token(
            torch.stack([mask16, (mask16 > 0).to(mask16)], dim=-1)
        )
        flat = tokens.flatten(0, 1)  # (R * L, T, C)
        flat = self.reference_attention(flat, flat)
        flat = flat + self.reference_mlp(flat)
        return Remembered(
            descriptor=encoded.descriptor.flatten(2).transpose(1, 2),
            mask8=mask8.flatten(2),
            tokens=flat.unflatten(0, (-1, n_labels)),
            sums4=_inside_outside(encoded.fine4, F.avg_pool2d(masks, 4)),
            sums2=_inside_outside(encoded.fine2, F.avg_pool2d(masks, 2)),
        )

    # ---- step 3 ------------------------------------------------------------------------------
    def trust(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines (B, R) of whole pictures -> trust in each reference, of vote and attention."""
        relative = (similarity - similarity.amax(1, keepdim=True)).float()
        vote, attention = self.log_trust.exp()[:, None, None] * relative
        return vote, attention

    def vote(
        self,
        descriptor: Tensor,
        references: Tensor,
        values: Tensor,
        known: Tensor,
        trust: Tensor,
        place: float = 1.0,
        moves: Tensor | None = None,
    ) -> Tensor:
        """The label-transfer prior, once for all labels.

        P(p) = sum_s softmax_s(tau (<d_p, d_s> - w |x_p - x_s|^2) + t_s) onehot_s over all positions
        s of all references, t_s being the trust in the reference that s lies in; where a label is
        unknown to a reference, the label's vote is that of the others alone.

        Args:
            descriptor: (B, 152, side, side) of the queries.
            references: (B, R, P, 152).
            values: (B, R, L, P) share of each label.
            known: (B, R, L) bool.
            trust: (B, R), up to a constant.
            place: factor on w, see `Study`.
            moves: (B, R, P, 2) added to the references' places x_s, see `displacements`.

        Returns:
            (B, H, L + 1, side, side) probabilities, background last.
        """
        b, r = references.shape[:2]
        side = descriptor.shape[-1]
        d_q = descriptor.float().flatten(2).transpose(1, 2)  # (B, P, 152)
        d_s = references.float().flatten(1, 2)  # (B, R * P, 152)
        # |x_p|^2 is the same for all s and leaves the softmax; the rest of the squared distance is
        # linear in (x_s, |x_s|^2): with the trust four more dimensions, and scores are one product.
        cells = grid(side, descriptor.device)  # (P, 2)
        x_q = cells.expand(b, -1, -1)
        x_s = cells.expand(b, r, -1, -1) if moves is None else cells + moves
        x_s = _near(x_s).flatten(1, 2)  # (B, R * P, 3)
        bias = trust.float().repeat_interleave(len(cells), 1)[..., None]  # (B, R * P, 1)
        one = torch.ones_like(x_q[..., :1])
        weight = known.float()[..., None]  # (B, R, L, 1)
        numerator = (values.float() * weight).permute(0, 1, 3, 2).flatten(1, 2)  # (B, R * P, L)
        counts = weight.expand_as(values).permute(0, 1, 3, 2).flatten(1, 2)
        everything_known = bool(known.all())
        content = numerator if everything_known else torch.cat([numerator, counts], dim=-1)
        votes = []
        for head in range(1 + self.config.vote_heads):
            q, k = self._seen_by(head, d_q), self._seen_by(head, d_s)
            pull = self.place_weight[head].exp() * place
            tau = self.log_tau[head].exp()
            q = tau * torch.cat([q, pull * x_q, pull * one, one], dim=-1)
            keys = torch.cat([k, x_s, bias / tau], dim=-1).transpose(1, 2)
            # some rows at a time: their scores (B, rows, R * P) stay near the processor
            taken = torch.cat(
                [
                    torch.softmax(rows @ keys, dim=-1) @ content
                    for rows in q.split(VOTE_ROWS, dim=1)
                ],
                dim=1,
            )
            if not everything_known:
                share, known_share = taken.chunk(2, dim=-1)
                taken = share / known_share.clamp_min(1e-6)
            votes.append(taken)
        labels = torch.stack(votes, dim=1).transpose(2, 3).clamp(0, 1)  # (B, H, L, P)
        rest = (1 - labels.sum(2, keepdim=True)).clamp(0, 1)
        return torch.cat([labels, rest], dim=2).unflatten(-1, (side, side))

    def vote_losses(
        self,
        query: Remembered,
        memory: Remembered,
        known: Tensor,
        trust: Tensor,
        places: Tensor,
        moves: Tensor | None = None,
    ) -> Tensor:
        """How badly references vote for a labelled slice, if place counts so much.

        Cross entropy of the heads' mean vote, labels and background, on and around the labels.

        Args:
            query: of one slice, fields without the leading dimension: descriptor (P, 152), mask8
                (L, P).
            memory: of R references.
            known: (R, L) bool.
            trust: (R,).
            places: (N,) factors on w, see `vote`.
            moves: (R, P, 2), see `vote`.

        Returns:
            (N,) mean over the cells; NaN where the slice shows no label.
        """
        side = round(query.mask8.shape[-1] ** 0.5)
        truth = query.mask8.float()
        around = F.max_pool2d(truth.amax(0).view(1, 1, side, side), AROUND, 1, AROUND // 2)
        rows = torch.nonzero(around.flatten() > 0).flatten()
        if len(rows) == 0:
            return torch.full((len(places),), torch.nan)
        rows = rows[:: -(-len(rows) // MOST_CELLS)]
        truth = torch.cat([truth, (1 - truth.sum(0, keepdim=True)).clamp(0, 1)])[:, rows].T
        d_q, d_s = query.descriptor[rows].float(), memory.descriptor.float().flatten(0, 1)
        cells = grid(side, d_q.device)
        x_q = torch.cat([cells[rows], torch.ones_like(cells[rows, :1])], 1)
        x_s = cells.expand(len(known), -1, -1) if moves is None else cells + moves
        x_s = _near(x_s).flatten(0, 1)
        distance = -(x_q @ x_s.T)  # but for |x_p|^2
        bias = trust.float().repeat_interleave(len(cells))
        weight = known.float()[:, :, None]
        values = (memory.mask8.float() * weight).permute(0, 2, 1).flatten(0, 1)  # (R * P, L)
        counts = weight.expand_as(memory.mask8).permute(0, 2, 1).flatten(0, 1)
        content = torch.cat([values, counts], 1)
        votes = torch.zeros(len(places), *truth.shape, device=d_q.device)
        heads = 1 + self.config.vote_heads
        for head in range(heads):
            tau = self.log_tau[head].exp()
            looks = bias + tau * (self._seen_by(head, d_q) @ self._seen_by(head, d_s).T)
            far = tau * self.place_weight[head].exp() * distance
            for row, place in enumerate(places.tolist()):
                taken = torch.softmax(looks - place * far, dim=-1) @ content
                share, known_share = taken.chunk(2, dim=-1)
                labels = (share / known_share.clamp_min(1e-6)).clamp(0, 1)
                rest = (1 - labels.sum(1, keepdim=True)).clamp(0, 1)
                votes[row] += torch.cat([labels, rest], 1) / heads
        return -(truth * (votes + VOTE_FLOOR).log()).sum(2).mean(1)

    def _seen_by(self, head: int, descriptor: Tensor) -> Tensor:
        """Descriptors (..., 152) as a vote head compares them, of unit length."""
        if head == 0:
            return descriptor
        dim = self.config.vote_dim
        rows = self.project.weight[(head - 1) * dim : head * dim].float()
        return F.normalize(descriptor @ rows.T, dim=-1)

    def segment(
        self,
        query: Encoded,
        memory: Remembered,
        known: Tensor,
        similarity: Tensor,
        place: float = 1.0,
        moves: Tensor | None = None,
    ) -> Output:
        """Segment B queries, each by R memories.

        Args:
            query: of B images.
            memory: fields have a leading B.
            known: (B, R, L) bool.
            similarity: (B, R) cosine of the whole pictures' embeddings. More references would
                else drown the few that resemble the query.
            place: see `vote`.
            moves: see `vote`.
        """
        b, n_labels = known.shape[0], known.shape[2]
        s8 = query.descriptor.shape[-1]
        vote_trust, attention_trust = self.trust(similarity)
        votes = self.vote(
            query.descriptor, memory.descriptor, memory.mask8, known, vote_trust, place, moves
        )
        # Which head to believe, by place: from what the heads say and what the query looks like.
        evidence = torch.cat([votes[:, :, :-1].amax(2), votes[:, :, -1], query.descriptor], dim=1)
        share = self.mix(evidence).float().softmax(1)  # (B, H, s8, s8)
        mixed = (share[:, :, None] * votes).sum(1)  # (B, L + 1, s8, s8)
        log = (mixed + VOTE_EPSILON).log()
        vote_scores = log[:, :-1] - log[:, -1:]  # (B, L, s8, s8)
        own = votes[:, :, :-1].transpose(1, 2)  # (B, L, H, s8, s8)
        rival = _rival(mixed[:, :-1])
        clues = torch.cat([own, mixed[:, :-1, None], rival[:, :, None]], dim=2)  # (B, L, H + 2, ..)

        # Joint attention at stride 16.
        side = s8 // 2
        flat_clues = clues.flatten(0, 1)  # (B * L, H + 2, s8, s8)
        coarse = F.avg_pool2d(flat_clues, 2).flatten(2).transpose(1, 2)
        code = place_code(side, self.config.tokens, votes.device)
        tokens = (query.tokens + code).repeat_interleave(n_labels, 0) + self.vote_token(coarse)
        context = memory.tokens.transpose(1, 2).flatten(0, 1).flatten(1, 2)  # (B * L, R * T, C)
        bias = attention_trust[:, None].expand(-1, n_labels, -1).flatten(0, 1)  # (B * L, R)
        if not bool(known.all()):
            bias = bias.masked_fill(~known.transpose(1, 2).flatten(0, 1), -1e4)
        bias = bias.repeat_interleave(side * side, 1)
        for attend_self, attend, mlp in zip(
            self.self_attention, self.cross_attention, self.mlp, strict=True
        ):
            tokens = attend(attend_self(tokens, tokens), context.to(tokens.dtype), bias)
            tokens = tokens + mlp(tokens)
        deep = tokens.transpose(1, 2).unflatten(-1, (side, side))

        # Decoder: query maps are shared by the labels, conditions are per label.
        deep = F.interpolate(deep, size=(s8, s8), mode="bilinear")
        x = self.enter8(query.descriptor).repeat_interleave(n_labels, 0)
        x = self.block8(x + self.condition8(torch.cat([deep, flat_clues.to(deep.dtype)], 1)))
        seen = torch.cat([x.mean((2, 3)), x.amax((2, 3)), tokens.mean(1), tokens.amax(1)], 1)
        x = F.interpolate(self.to4(x), scale_factor=2, mode="bilinear")
        x = self.block4(x + _compare(self.skip4, query.fine4, memory.sums4, known))
        x = F.interpolate(self.to2(x), scale_factor=2, mode="bilinear")
        x = self.block2(x + _compare(self.skip2, query.fine2, memory.sums2, known))
        refined = F.pixel_shuffle(self.head(x), 2).float().unflatten(0, (b, n_labels))[:, :, 0]
        base = F.interpolate(vote_scores, scale_factor=8, mode="bilinear")
        scores = self.vote_gain * base + refined
        area = scores.detach().sigmoid().mean((2, 3)).flatten()
        peak = scores.detach().amax((2, 3)).flatten() * 0.1
        seen = torch.cat([seen.float(), area[:, None], peak[:, None]], 1)
        presence, quality = self.judge(seen).float().unflatten(0, (b, n_labels)).unbind(-1)
        return Output(scores, votes, vote_scores, presence, quality)


def _near(places: Tensor) -> Tensor:
    """Places (..., 2) -> (..., 3), whose product with (x, y, 1) is -|x_p - x_s|^2 + |x_p|^2."""
    return torch.cat([2 * places, -places.square().sum(-1, keepdim=True)], -1)


def _inside_outside(fine: Tensor, masks: Tensor) -> Tensor:
    """fine (R, C, h, w), masks (R, L, h, w) -> sums (R, L, 2, C + 1), the last channel counts.

    Outside counts only near the mask's own area at most (both sums are later divided by their
    counts), so the two prototypes are means whatever the label's size.
    """
    flat = fine.float().flatten(2).transpose(1, 2)  # (R, h * w, C)
    flat = torch.cat([flat, torch.ones_like(flat[..., :1])], -1) / flat.shape[1]
    weights = torch.stack([masks, 1 - masks], 2).flatten(3).flatten(1, 2)  # (R, L * 2, h * w)
    return (weights.float() @ flat).unflatten(1, (-1, 2))


def _compare(skip: nn.Conv2d, fine: Tensor, sums: Tensor, known: Tensor) -> Tensor:
    """A 1x1 convolution over [fine, fine * inside, fine * outside], (B * L, C_out, h, w).

    The products with the prototypes are folded into the weights, one small matrix for each query
    and label, so that the three-fold maps never exist.
    """
    total = (sums.float() * known[..., None, None]).sum(1)  # (B, L, 2, C + 1)
    prototypes = total[..., :-1] / total[..., -1:].clamp_min(1e-5)
    prototypes = F.normalize(prototypes, dim=-1) * prototypes.shape[-1] ** 0.5  # (B, L, 2, C)
    plain, inside, outside = skip.weight[:, :, 0, 0].chunk(3, dim=1)  # (C_out, C) each
    folded = plain + inside * prototypes[:, :, 0, None] + outside * prototypes[:, :, 1, None]
    maps = torch.matmul(folded.to(fine.dtype), fine.flatten(2)[:, None])  # (B, L, C_out, h * w)
    assert skip.bias is not None
    bias = skip.bias[:, None]
    return (maps + bias.to(fine.dtype)).flatten(0, 1).unflatten(-1, fine.shape[-2:])


def _rival(votes: Tensor) -> Tensor:
    """For each label the highest vote of any other, (B, L, h, w); zero where it has no rival."""
    if votes.shape[1] == 1:
        return torch.zeros_like(votes)
    top = votes.topk(2, dim=1).values
    return torch.where(votes == top[:, :1], top[:, 1:], top[:, :1])
