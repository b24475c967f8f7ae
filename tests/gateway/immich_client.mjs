// Requests of immich's server: of its release 2, a FormData with a Blob; of its release 3, a form encoded by hand.
// Reads {url, form, entries, text, image} as JSON, the image as a path; prints {status, answer}.
import { randomUUID } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { text as textOf } from 'node:stream/consumers';

const asked = JSON.parse(await textOf(process.stdin));
const entries = JSON.stringify(asked.entries);
const image = asked.image === undefined ? undefined : await readFile(asked.image);

function release2() {
  const form = new FormData();
  form.append('entries', entries);
  if (image !== undefined) form.append('image', new Blob([new Uint8Array(image)]));
  else form.append('text', asked.text);
  return { body: form };
}

function release3() {
  const boundary = `immich-${randomUUID()}`;
  const fields = [['entries', '', Buffer.from(entries)]];
  if (image === undefined) fields.push(['text', '', Buffer.from(asked.text)]);
  else fields.push(['image', '; filename="blob"', image]);
  const pieces = [];
  for (const [name, file, content] of fields) {
    const type = file ? 'Content-Type: application/octet-stream\r\n' : '';
    const head = `--${boundary}\r\nContent-Disposition: form-data; name="${name}"${file}\r\n${type}\r\n`;
    pieces.push(Buffer.from(head), content, Buffer.from('\r\n'));
  }
  pieces.push(Buffer.from(`--${boundary}--\r\n`));
  const headers = { 'Content-Type': `multipart/form-data; boundary=${boundary}` };
  return { body: Buffer.concat(pieces), headers };
}

const request = asked.form === 'release 2' ? release2() : release3();
const response = await fetch(new URL('predict', asked.url), { method: 'POST', ...request });
const pong = await (await fetch(new URL('ping', asked.url))).text();
console.log(JSON.stringify({ status: response.status, answer: await response.json(), pong }));
