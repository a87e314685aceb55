// OHIF as MONAI Label serves it, used by a person: what to click, and what is then on the screen.
// Called by `python -m scenes`: node ohif.mjs SCENE.json; the scene names all else.
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const scene = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const { chromium } = createRequire(join(scene.packages, 'package.json'))('playwright-core');
const told = { calls: [], problems: [] };

const browser = await chromium.launch({
  executablePath: scene.chromium,
  // WebGL without a graphics card
  args: ['--no-sandbox', '--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader'],
});
const page = await browser.newPage({ viewport: { width: 1200, height: 700 } });
page.setDefaultTimeout(60_000);
page.on('pageerror', (error) => told.problems.push(error.message));
page.on('dialog', (dialog) => dialog.accept());
page.on('response', (response) => {
  const path = response.url().replace(scene.url, '');
  if (/^\/(info|infer|activelearning|datastore)/.test(path)) {
    told.calls.push(`${response.status()} ${response.request().method()} ${path.split('?')[0]}`);
  } else if (response.status() >= 500) {
    told.problems.push(`${response.status()} ${path}`);
  }
});

const picture = (name) => page.screenshot({ path: join(scene.out, `${name}.png`) });

async function connect() {
  await page.locator('#monailabelServerURL').waitFor();
  // the images first: OHIF lays its empty segmentation over the open viewport
  await page.waitForFunction(() => {
    const cache = window.cornerstone?.cache;
    return cache && [...cache._volumeCache.values()].some((entry) => entry.volume?.loadStatus?.loaded);
  });
  await page.locator('#monailabelServerURL').fill(`${scene.url}/`);
  await page.locator('.settingsTable button').click();
  await page.getByText('Auto-Segmentation').waitFor();
  await page.waitForTimeout(2500); // it gives the labels their colors a second later
}

async function run() {
  const answer = page.waitForResponse((response) => response.url().includes('/infer/refseg'));
  await page.getByText('Auto-Segmentation').click();
  await page.locator('button[title="Run Segmentation"]').click();
  if ((await answer).status() !== 200) throw new Error(`refseg: ${(await answer).status()}`);
  await page.getByText('Running Segmentation - Successful').waitFor();
  await page.waitForTimeout(2500);
  // what OHIF holds and shows, not what it was sent
  return page.evaluate(() => {
    const service = window.services.segmentationService;
    const volume = service.getLabelmapVolume('1');
    const segments = Object.values(service.getSegmentation('1').segments);
    return {
      names: Object.fromEntries(segments.map((one) => [one.label, one.segmentIndex])),
      dimensions: [...volume.dimensions],
      voxels: Array.from(volume.voxelManager.getCompleteScalarDataArray()),
    };
  });
}

try {
  await page.goto(`${scene.url}/ohif/`);
  await page.getByText('Confirm and Hide').click();
  await page.getByText(scene.patient).first().click();
  await page.getByText('MONAI Label').first().click();
  await connect();
  told.first = await run();
  await picture('ohif_segmentation');

  await page.getByText('Active Learning', { exact: true }).click();
  for (told.next = scene.study; told.next.includes(scene.study); ) {
    await page.getByText('Next Sample', { exact: true }).click(); // to ask again is to skip
    await page.locator('.nextSampleForm table').waitFor();
    told.next = await page.locator('.nextSampleForm table').innerText();
    await page.waitForTimeout(800);
    if (told.next.includes(scene.study)) await page.keyboard.press('Escape');
  }
  await picture('ohif_next_sample');
  await page.locator('.nextSampleForm button').click();
  await page.waitForURL((address) => !address.href.includes(scene.study), { waitUntil: 'commit' });
  told.opened = page.url();
  await connect();

  // somebody else labels that patient, and draws one structure more
  const form = new FormData();
  form.append('params', JSON.stringify(scene.submit.params));
  form.append('label', new Blob([readFileSync(scene.submit.file)]), 'label.nii.gz');
  const image = encodeURIComponent(scene.submit.image);
  const stored = await fetch(`${scene.url}/datastore/label?image=${image}`, { method: 'PUT', body: form });
  told.stored = stored.status;

  await page.goto(`${scene.url}/ohif/monai-label?StudyInstanceUIDs=${scene.study}`);
  await connect();
  told.second = await run();
  await picture('ohif_after_submit');

  // what the extension lacks: a label is corrected in OHIF's own mode, and stored in the PACS
  await page.goto(`${scene.url}/ohif/segmentation?StudyInstanceUIDs=${scene.labelled}`);
  await page.locator('[data-cy="study-browser-thumbnail-no-image"]').dblclick();
  await page.getByText('Do you want to open this Segmentation?').waitFor();
  told.listed = await page.getByText(/^(liver|spleen)$/).allInnerTexts();
  await page.getByRole('button', { name: 'Yes' }).click();
  await page.getByText('Do you want to open this Segmentation?').waitFor({ state: 'hidden' });
  await page.waitForTimeout(2500);
  await page.getByText('spleen', { exact: true }).click();
  await page.locator('[data-cy="Brush"]').click();
  const pane = await page.locator('[data-cy="viewport-pane"]').first().boundingBox();
  const [x, y] = [pane.x + pane.width * 0.7, pane.y + pane.height * 0.5];
  await page.mouse.move(x, y);
  await page.mouse.down();
  for (let step = 0; step < 10; step++) await page.mouse.move(x + 2 * step, y + (step % 5) * 4);
  await page.mouse.up();
  await page.waitForTimeout(1500);
  await picture('ohif_correction');
  const chosen = await page.getByText('Labels of RefSeg').last().boundingBox();
  await page.mouse.click(chosen.x - 25, chosen.y + chosen.height / 2); // the dots beside the name
  await page.getByRole('menuitem', { name: 'Export & Download' }).hover();
  const download = page.waitForEvent('download');
  await page.getByRole('menuitem', { name: 'Download DICOM SEG' }).click();
  const file = join(scene.out, 'corrected.dcm');
  await (await download).saveAs(file);
  await page.goto(`${scene.url}/ohif/`);
  await page.getByText('Upload').first().click();
  await page.locator('input[type=file]').first().setInputFiles(file);
  await page.getByText('1 file completed').waitFor();
} catch (error) {
  told.problems.push(`${error.message}`);
  await picture('ohif_failed');
} finally {
  writeFileSync(join(scene.out, 'ohif.json'), JSON.stringify(told));
  await browser.close();
}
