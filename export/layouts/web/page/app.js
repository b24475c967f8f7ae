// The page: a form, a grid of pictures, and everything that a reader should know.

import { megabytes } from "./assets.js";

const PER_PAGE = 24;
const element = (id) => document.getElementById(id);
const { showFailure } = window.babeltower;

let site = null;
let items = [];
let number = 0;
let asked = null;

if (!window.babeltower.failed) {
  window.babeltower.running = true;
  start();
}

function start() {
  element("loading").hidden = false;
  const engine = new Worker(new URL("engine.js", import.meta.url), { type: "module" });
  engine.onerror = (event) =>
    fail(
      `The engine stopped: ${event.message ?? "engine.js, or a file that it imports, is missing or damaged"}. ` +
        "Reload the page; if it happens again, copy the whole folder to the host again.",
    );
  engine.onmessage = ({ data }) => receive[data.type](data, engine);
  element("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(engine, PER_PAGE);
  });
  element("more").addEventListener("click", () => ask(engine, asked.k + PER_PAGE));
  element("language").addEventListener("change", showLanguage);
}

function fail(message) {
  document.body.dataset.state = "failed";
  showFailure(message);
}

const receive = {
  site({ site: found }) {
    site = found;
    document.title = `${site.title} – search`;
    element("title").textContent = site.title;
    element("credit").textContent = site.gallery.credit;
    element("facts").textContent =
      `Model ${site.name} (${site.family}, ${site.precision.toUpperCase()}, licence ${site.licence}); ` +
      `${site.gallery.size.toLocaleString("en")} ${site.gallery.kind}, every one compared. Made by babeltower.`;
    fillLanguages();
  },
  progress({ done, total }) {
    element("loading-bar").value = done / total;
    element("loading-text").textContent = `Loading ${megabytes(done)} of ${megabytes(total)} …`;
  },
  step({ text }) {
    element("loading-bar").removeAttribute("value");
    element("loading-text").textContent = text;
  },
  ready({ items: found, checked, milliseconds, threads }, engine) {
    items = found;
    element("loading").hidden = true;
    element("ask").hidden = false;
    element("checked").textContent =
      `Checked in this browser: ${checked.tokenized} texts give the tokens of the exported model, and ` +
      `${checked.embedded} its vectors (cosine ${checked.mean.toFixed(6)} in the mean, ${checked.lowest.toFixed(6)} at least).`;
    document.body.dataset.state = "ready";
    Object.assign(document.body.dataset, { openMs: milliseconds.open, checkMs: milliseconds.check, threads, lowest: checked.lowest });
    fromAddress();
    showLanguage();
    if (element("text").value) ask(engine, PER_PAGE);
    else element("text").focus();
  },
  failed({ message }) {
    fail(message);
  },
  answer(data) {
    if (data.number !== number) return;
    window.babeltower.answer = data;
    showNotes(data.notes);
    showHits(data.hits);
    const ms = data.milliseconds.embed + data.milliseconds.search;
    element("status").textContent = `${data.hits.length} of ${items.length.toLocaleString("en")} · ${Math.round(ms)} ms`;
    element("more").hidden = data.hits.length >= items.length;
    document.body.dataset.answered = number;
  },
  dropped(data) {
    if (data.number !== number) return;
    showNotes([...window.babeltower.answer.notes, ...data.notes]);
    document.body.dataset.settled = number;
  },
  refused(data) {
    if (data.number !== number) return;
    element("results").replaceChildren();
    element("more").hidden = true;
    element("status").textContent = "";
    showNotes([data.message]);
    document.body.dataset.answered = document.body.dataset.settled = number;
  },
};

function ask(engine, k) {
  const text = element("text").value;
  if (!text.trim()) {
    showNotes(["Type what you are looking for."]);
    element("text").focus();
    return;
  }
  asked = { text, language: element("language").value, k };
  number += 1;
  toAddress();
  element("status").textContent = "Searching …";
  engine.postMessage({ ...asked, number });
}

// --- languages

function fillLanguages() {
  const own = (tag) => {
    try {
      return new Intl.DisplayNames([tag], { type: "language", fallback: "none" }).of(tag);
    } catch {
      return undefined;
    }
  };
  const named = site.languages.map(({ code, tag, name }) => {
    const here = own(tag);
    return { code, name: here && here !== name ? `${here} – ${name}` : name, order: name };
  });
  named.sort((a, b) => a.order.localeCompare(b.order, "en"));
  element("language").replaceChildren(...named.map(({ code, name }) => new Option(name, code)));
  element("language-field").hidden = !site.choose_language;
  const wanted = navigator.languages.map(codeOfTag).find(Boolean) ?? codeOfTag("en") ?? named[0].code;
  element("language").value = wanted;
}

function codeOfTag(wanted) {
  const maximal = (tag) => {
    try {
      return new Intl.Locale(tag).maximize();
    } catch {
      return null;
    }
  };
  const locale = maximal(wanted);
  return site.languages.find(({ tag }) => {
    const known = maximal(tag);
    return locale && known && known.language === locale.language && known.script === locale.script;
  })?.code;
}

function showLanguage() {
  const language = site.languages.find(({ code }) => code === element("language").value);
  const input = element("text");
  input.dir = "auto";
  if (site.choose_language && language) input.lang = language.tag;
  const examples = language?.examples ?? [];
  element("examples").replaceChildren(
    ...examples.map((example) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = example;
      button.lang = language.tag;
      button.dir = "auto";
      button.addEventListener("click", () => {
        input.value = example;
        element("ask").requestSubmit();
      });
      return button;
    }),
  );
  element("examples").hidden = !examples.length;
}

// --- answers

function showHits(hits) {
  element("results").replaceChildren(...hits.map(({ row, score }) => cardOf(items[row], score)));
}

function cardOf({ name, picture }, score) {
  const card = document.createElement("li");
  if (site.gallery.has_pictures) card.append(frameOf(picture));
  const words = document.createElement("p");
  words.className = "name";
  words.dir = "auto";
  words.textContent = name;
  const value = document.createElement("p");
  value.className = "quiet score";
  value.textContent = score.toFixed(3);
  value.title = "Cosine of text and picture";
  card.append(words, value);
  return card;
}

function frameOf(picture) {
  const frame = document.createElement("div");
  frame.className = "picture";
  if (picture) {
    const image = document.createElement("img");
    image.alt = "";
    image.decoding = "async";
    image.addEventListener("error", () => frame.replaceChildren("picture missing on the host"));
    image.src = new URL(picture, document.baseURI).href;
    frame.append(image);
  } else frame.append("no picture");
  return frame;
}

function showNotes(notes) {
  element("notes").replaceChildren(
    ...notes.map((note) => {
      const line = document.createElement("p");
      line.textContent = note;
      return line;
    }),
  );
}

// --- the query in the address, so that it can be kept and shared

function toAddress() {
  const query = new URLSearchParams({ q: asked.text });
  if (site.choose_language) query.set("l", asked.language);
  history.replaceState(null, "", `#${query}`);
}

function fromAddress() {
  const query = new URLSearchParams(location.hash.slice(1));
  const language = query.get("l");
  if (language && site.languages.some(({ code }) => code === language)) element("language").value = language;
  element("text").value = query.get("q") ?? "";
}
