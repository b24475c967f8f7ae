// Worker of the page: loads the text tower and the gallery, proves that they answer here, and answers queries.

import * as ort from "./vendor/onnxruntime-web/ort.wasm.min.js";
import { PageError, loadAssets, loadSite } from "./assets.js";
import { Gallery, cosine, floatsFromHalves } from "./gallery.js";
import { TextReader } from "./text.js";

const base = new URL("./", import.meta.url);
const MOST_THREADS = 4;
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
const jsonOf = (bytes) => JSON.parse(decoder.decode(bytes));

let site, reader, session, gallery;

async function open() {
  site = await loadSite(new URL("site.json", base));
  if (site.format !== "babeltower-web/1") {
    throw new PageError(`site.json has format ${site.format}; this page reads babeltower-web/1. Export both together.`);
  }
  const { whole_tokenizer: whole, ...needed } = site.assets;
  postMessage({ type: "site", site });
  let last = 0;
  const files = await loadAssets(needed, base, (done, total) => {
    if (done === total || performance.now() - last > 50) {
      last = performance.now();
      postMessage({ type: "progress", done, total });
    }
  });
  postMessage({ type: "step", text: "Opening the model …" });
  const started = performance.now();
  reader = new TextReader(site.text, jsonOf(files.tokenizer), whole ? () => loadWhole(whole) : null);
  gallery = new Gallery(floatsFromHalves(files.vectors), site.dim);
  session = await openSession(files);
  const opened = performance.now();
  postMessage({ type: "step", text: "Checking that the model answers here as where it was exported …" });
  const checked = await check(jsonOf(files.probes), files.probe_vectors);
  const milliseconds = { open: opened - started, check: performance.now() - opened };
  postMessage({ type: "ready", items: jsonOf(files.items), checked, milliseconds, threads: ort.env.wasm.numThreads });
}

async function loadWhole(asset) {
  const { whole } = await loadAssets({ whole: asset }, base);
  return jsonOf(whole);
}

async function openSession(files) {
  const vendor = new URL("vendor/onnxruntime-web/", base);
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency ?? 1) : 1;
  ort.env.wasm.wasmPaths = { mjs: new URL("ort-wasm-simd-threaded.js", vendor).href };
  ort.env.wasm.wasmBinary = files.wasm.buffer;
  const externalData = files.weights ? [{ path: site.weights_name, data: files.weights }] : [];
  try {
    return await ort.InferenceSession.create(files.graph, { executionProviders: ["wasm"], externalData });
  } catch (error) {
    throw new PageError(
      `The model could not be opened: ${error.message ?? error}. If memory is short, close other tabs; otherwise copy the whole folder to the host again.`,
    );
  }
}

async function embed(ids) {
  const shape = [1, ids.length];
  const rows = { input_ids: ids, attention_mask: ids.map(() => 1) };
  const feeds = Object.fromEntries(
    session.inputNames.map((name) => [name, new ort.Tensor("int64", BigInt64Array.from(rows[name], BigInt), shape)]),
  );
  const found = await session.run(feeds, [site.output]);
  return found[site.output].data;
}

/** Compare tokens and vectors of the probes with those of the exported model. */
async function check(probes, bytes) {
  const expected = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
  const different = probes.filter(({ text, language, ids }) => reader.read(text, language).ids.join() !== ids.join());
  if (different.length) {
    const [{ text, language }] = different;
    throw new PageError(
      `This browser splits ${different.length} of ${probes.length} probe texts into other tokens than the exported model, ` +
        `such as “${text}” (${language}), so its answers would be wrong. Use another browser.`,
    );
  }
  const embedded = probes.filter(({ vector }) => vector !== undefined);
  let lowest = 1;
  let sum = 0;
  for (const { text, language, ids, vector } of embedded) {
    const found = cosine(await embed(ids), expected.subarray(vector * site.dim, (vector + 1) * site.dim));
    if (!(found >= site.least_cosine)) {
      throw new PageError(
        `The model does not answer here as where it was exported: for “${text}” (${language}) the vectors agree to a ` +
          `cosine of ${found.toFixed(4)}, and at least ${site.least_cosine} is required. This browser computes it wrongly. Use another browser.`,
      );
    }
    lowest = Math.min(lowest, found);
    sum += found;
  }
  const mean = sum / embedded.length;
  if (!(mean >= site.mean_cosine)) {
    throw new PageError(
      `The model does not answer here as where it was exported: the vectors of ${embedded.length} texts agree to a mean ` +
        `cosine of ${mean.toFixed(5)}, and at least ${site.mean_cosine} is required. This browser computes it wrongly. Use another browser.`,
    );
  }
  return { lowest, mean, embedded: embedded.length, tokenized: probes.length };
}

async function answer({ number, text, language, k }) {
  try {
    const { ids, notes } = reader.read(text, language);
    const started = performance.now();
    const vector = await embed(ids);
    const embedded = performance.now();
    if (!vector.every(Number.isFinite)) throw new PageError("The model's answer is not a number. Reload the page.");
    const hits = gallery.nearest(vector, k);
    const milliseconds = { embed: embedded - started, search: performance.now() - embedded };
    postMessage({ type: "answer", number, hits, notes, milliseconds, ids, vector });
    const dropped = await reader.droppedNotes(text).catch((error) => [
      `Some of the text may be outside of the languages that this page keeps, and this could not be checked. ${messageOf(error)}`,
    ]);
    postMessage({ type: "dropped", number, notes: dropped });
  } catch (error) {
    postMessage({ type: "refused", number, message: messageOf(error) });
  }
}

const messageOf = (error) =>
  error instanceof PageError ? error.message : `Something unforeseen failed: ${error.message ?? error}. Reload the page.`;

self.onmessage = ({ data }) => answer(data);

open().catch((error) => postMessage({ type: "failed", message: messageOf(error) }));
