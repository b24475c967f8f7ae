// Files of the page: fetched in parts, and compared with the checksums of site.json.

/** A reason why the page cannot answer, in words for its reader. */
export class PageError extends Error {}

const AT_ONCE = 4;
const AGAIN = "Copy the whole folder to the host again.";

/** Fetch site.json, which names all other files. */
export async function loadSite(url) {
  const response = await fetched(url, { cache: "no-cache" });
  try {
    return await response.json();
  } catch {
    throw new PageError(`${nameOf(url)} is damaged: it is not JSON. ${AGAIN}`);
  }
}

/**
 * Fetch several assets, join their parts, and unpack them.
 * @param {Object<string, {bytes: number, compressed: boolean, parts: {path: string, bytes: number, sha256: string}[]}>} assets
 * @param {URL} base Folder of the page.
 * @param {(bytes: number, total: number) => void} progress
 * @returns {Promise<Object<string, Uint8Array>>}
 */
export async function loadAssets(assets, base, progress = () => {}) {
  const found = {};
  const todo = [];
  let total = 0;
  for (const [name, asset] of Object.entries(assets)) {
    found[name] = room(name, asset.bytes);
    total += asset.bytes;
    let at = 0;
    for (const part of asset.parts) {
      todo.push({ part, target: found[name].subarray(at, at + part.bytes) });
      at += part.bytes;
    }
  }
  let done = 0;
  const count = (bytes) => progress((done += bytes), total);
  const work = async () => {
    for (let next = todo.shift(); next; next = todo.shift()) await loadPart(next.part, next.target, base, count);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  for (const [name, asset] of Object.entries(assets)) if (asset.compressed) found[name] = await unpacked(found[name]);
  return found;
}

async function unpacked(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function room(name, bytes) {
  try {
    return new Uint8Array(bytes);
  } catch {
    throw new PageError(`This device has no ${megabytes(bytes)} of memory for the ${name}. Close other tabs, or use a larger device.`);
  }
}

async function loadPart(part, target, base, count) {
  const url = new URL(part.path, base);
  url.searchParams.set("v", part.sha256.slice(0, 12)); // a cache never mixes two exports
  const response = await fetched(url);
  const reader = response.body.getReader();
  let at = 0;
  for (;;) {
    const { done, value } = await reader.read().catch(() => {
      throw new PageError(`The connection broke off while ${part.path} was loading. Reload the page.`);
    });
    if (done) break;
    if (at + value.length > part.bytes) throw changed(part, "is longer than");
    target.set(value, at);
    at += value.length;
    count(value.length);
  }
  if (at < part.bytes) throw changed(part, "is shorter than");
  if (!(await hasDigest(target, part.sha256))) throw changed(part, "differs from");
}

/** Compare bytes with a SHA-256 by the browser itself, which has crypto.subtle only on HTTPS and localhost. */
export async function hasDigest(bytes, sha256) {
  const pairs = sha256.match(/../g).map((pair) => String.fromCharCode(parseInt(pair, 16)));
  const url = URL.createObjectURL(new Blob([bytes]));
  try {
    await (await fetch(url, { integrity: `sha256-${btoa(pairs.join(""))}` })).arrayBuffer();
    return true;
  } catch {
    return false;
  } finally {
    URL.revokeObjectURL(url);
  }
}

async function fetched(url, options = {}) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new PageError(`${nameOf(url)} could not be fetched: there is no connection to the host. Reload the page.`);
  }
  if (!response.ok) throw new PageError(`${nameOf(url)} is missing on the host (HTTP ${response.status}). ${AGAIN}`);
  return response;
}

function changed(part, how) {
  return new PageError(`${part.path} ${how} the file that was exported: it was changed or cut on its way. ${AGAIN}`);
}

function nameOf(url) {
  return decodeURIComponent(new URL(url).pathname.split("/").pop());
}

export function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
