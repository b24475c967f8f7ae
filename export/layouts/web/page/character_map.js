// SentencePiece's character map, which tokenizers.js approximates by NFKC.
//
// A map is a double-array trie from UTF-8 bytes to replacements. As the tokenizers library does: a grapheme of
// fewer than six bytes is looked up whole, and replaced whole by the first entry that it begins with; where there
// is none, and in longer graphemes, each character is looked up by itself.

const LONGEST_GRAPHEME = 6;

const HAS_LEAF = 1 << 8;
const LABEL = 0x800000ff;
const VALUE = 0x7fffffff;

const offsetOf = (unit) => (unit >>> 10) << ((unit & (1 << 9)) >>> 6);

export class CharacterMap {
  /** @param {string} base64 "precompiled_charsmap" of a tokenizer.json. */
  constructor(base64) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    const size = view.getUint32(0, true);
    this.units = Uint32Array.from({ length: size / 4 }, (_, i) => view.getUint32(4 + 4 * i, true));
    this.replacements = bytes.subarray(4 + size);
    this.encoder = new TextEncoder();
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.segmenter = new Intl.Segmenter("en", { granularity: "grapheme" });
  }

  normalize(text) {
    let normalized = "";
    for (const { segment } of this.segmenter.segment(text)) {
      const bytes = this.encoder.encode(segment);
      const whole = bytes.length < LONGEST_GRAPHEME ? this.find(bytes) : null;
      if (whole !== null) normalized += whole;
      else for (const character of segment) normalized += this.find(this.encoder.encode(character)) ?? character;
    }
    return normalized;
  }

  /** Return the replacement of the shortest entry that bytes begin with, or null. */
  find(bytes) {
    let at = offsetOf(this.units[0]);
    for (const byte of bytes) {
      if (byte === 0) return null;
      at ^= byte;
      const unit = this.units[at];
      if ((unit & LABEL) >>> 0 !== byte) return null;
      at ^= offsetOf(unit);
      if (unit & HAS_LEAF) return this.replacement(this.units[at] & VALUE);
    }
    return null;
  }

  replacement(start) {
    const end = this.replacements.indexOf(0, start);
    return this.decoder.decode(this.replacements.subarray(start, end < 0 ? undefined : end));
  }
}
