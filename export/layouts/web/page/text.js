// From a text to token ids, as babeltower's runtime does: cleaning, tokenizing, special tokens, truncation.

import { PrecompiledNormalizer, Tokenizer } from "./vendor/tokenizers/tokenizers.min.js";
import { PageError } from "./assets.js";
import { CharacterMap } from "./character_map.js";

const maps = new Map();

PrecompiledNormalizer.prototype.normalize = function (text) {
  if (!maps.has(this.charsmap)) maps.set(this.charsmap, new CharacterMap(this.charsmap));
  return maps.get(this.charsmap).normalize(text);
};

const MOST_SHOWN = 6;

export class TextReader {
  /**
   * @param {object} text Entry "text" of site.json.
   * @param {object} tokenizerJson Decoded tokenizer.json.
   * @param {(() => Promise<object>) | null} loadWhole Fetch the whole vocabulary's tokenizer.json.
   */
  constructor(text, tokenizerJson, loadWhole = null) {
    this.text = text;
    this.tokenizer = new Tokenizer(tokenizerJson, {});
    this.specials = this.tokenizer.added_tokens.filter(({ normalized }) => !normalized).map(({ content }) => content);
    this.loadWhole = loadWhole;
    this.whole = null;
    this.replaced = new Map(text.cleaning.replaced);
    this.spaces = new RegExp(`[${text.cleaning.spaces}]+`, "u");
    this.mojibake = new RegExp(text.cleaning.mojibake, "u");
    this.references = new RegExp(text.cleaning.references, "u");
    this.punctuation = new RegExp(`[${text.cleaning.punctuation}]`, "gu");
    this.letters = new Set(text.kept?.letters ?? "");
  }

  /**
   * Tokenize a text.
   * @returns {{ids: number[], notes: string[]}} Token ids, and what was done otherwise than one may think.
   */
  read(text, language) {
    const { context_length, prefix_ids, suffix_ids, language_ids, pad_id, fixed_length, longest } = this.text;
    if (/\p{Surrogate}/u.test(text)) throw new PageError("The text holds half a character. Type it again.");
    if (text.length > longest) {
      throw new PageError(
        `The text has ${text.length.toLocaleString("en")} characters, of which the model would read only the first ` +
          `${context_length} tokens. Shorten it to ${longest.toLocaleString("en")} characters.`,
      );
    }
    const hasLanguages = Object.keys(language_ids).length > 0;
    if (hasLanguages && !(language in language_ids)) throw new PageError("Choose the language of the text.");
    const prefix = hasLanguages ? [language_ids[language]] : prefix_ids;
    const cleaned = this.clean(text);
    const tokens = this.tokens(cleaned);
    const room = context_length - prefix.length - suffix_ids.length;
    const ids = [...prefix, ...tokens.slice(0, room), ...suffix_ids];
    while (fixed_length && ids.length < context_length) ids.push(pad_id);
    const notes = [...this.cleaningNotes(text), ...this.spellingNotes(cleaned)];
    if (tokens.length > room) {
      notes.push(`The text is longer than the model reads: its first ${room} of ${tokens.length} tokens were used.`);
    }
    return { ids, notes };
  }

  tokens(cleaned) {
    return this.tokenizer.encode(cleaned, { add_special_tokens: false }).ids;
  }

  clean(text) {
    const kind = this.text.cleaning.kind;
    if (kind === "none") return text;
    let cleaned = "";
    for (const character of text) cleaned += this.replaced.get(character) ?? character;
    cleaned = cleaned.normalize("NFC");
    if (kind === "canonicalize") cleaned = cleaned.replaceAll("_", " ").replace(this.punctuation, "");
    if (kind === "canonicalize" || kind === "lower") cleaned = cleaned.toLowerCase();
    return cleaned.split(this.spaces).filter(Boolean).join(" ");
  }

  cleaningNotes(text) {
    if (this.text.cleaning.kind === "none") return [];
    const notes = [];
    if (this.references.test(text)) {
      notes.push("HTML codes such as &amp; are taken as they are written here; babeltower's runtime would decode them.");
    }
    if (this.mojibake.test(text)) {
      notes.push("Some of the text may have been decoded wrongly (such as “Ã©” for “é”). It is taken as it is written here; babeltower's runtime would try to mend it.");
    }
    return notes;
  }

  /** Tell of texts that spell a special token only once they are normalized: tokenizers.js takes it for the token. */
  spellingNotes(cleaned) {
    const normalized = this.tokenizer.normalizer?.(cleaned) ?? cleaned;
    const count = (text, token) => text.split(token).length;
    const spelt = this.specials.find((token) => count(normalized, token) > count(cleaned, token));
    return spelt ? [`“${spelt}” is a special token of the model, and was taken for it here; babeltower's runtime would read its letters.`] : [];
  }

  /** Tell which tokens of the whole vocabulary a text needs that were dropped, if any. */
  async droppedNotes(text) {
    if (!this.text.kept) return [];
    const cleaned = this.clean(text);
    if (this.text.kept.by_letters) {
      const others = [...cleaned.normalize("NFKC")].filter((one) => /[\p{L}\p{M}]/u.test(one) && !this.letters.has(one));
      if (!others.length) return []; // all pieces that such letters spell were kept
    }
    if (this.whole === null) {
      this.whole = new Tokenizer(await this.loadWhole(), {});
      this.pieces = new Set(this.tokenizer.get_vocab().keys());
    }
    const tokens = this.whole.encode(cleaned, { add_special_tokens: false }).ids.map((id) => this.whole.id_to_token(id));
    const dropped = [...new Set(tokens.filter((token) => !this.pieces.has(token)))];
    if (!dropped.length) return [];
    const shown = dropped.slice(0, MOST_SHOWN).map((token) => `“${token.replaceAll("▁", " ").trim()}”`).join(", ");
    const more = dropped.length > MOST_SHOWN ? ` and ${dropped.length - MOST_SHOWN} more` : "";
    return [
      `This page keeps the vocabulary of some languages only, without ${shown}${more}: ` +
        `the text was read in smaller pieces, so the answers may be worse.`,
    ];
  }
}
