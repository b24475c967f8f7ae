// Vectors of a gallery, and the rows of it that are nearest to a query.

/** Decode little-endian float16 to float32. */
export function floatsFromHalves(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const floats = new Float32Array(bytes.byteLength / 2);
  for (let i = 0; i < floats.length; i++) floats[i] = floatFromHalf(view.getUint16(2 * i, true));
  return floats;
}

function floatFromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

export class Gallery {
  /** @param {Float32Array} vectors Rows of unit length, joined. */
  constructor(vectors, dim) {
    this.vectors = vectors;
    this.dim = dim;
    this.size = vectors.length / dim;
  }

  /** Return the k best rows and their cosines, best first; of equals, the first. */
  nearest(query, k) {
    const { vectors, dim, size } = this;
    const scores = new Float32Array(size);
    for (let row = 0, at = 0; row < size; row++) {
      let sum = 0;
      for (let i = 0; i < dim; i++) sum += vectors[at++] * query[i];
      scores[row] = sum;
    }
    const order = Uint32Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
    return Array.from(order.subarray(0, k), (row) => ({ row, score: scores[row] }));
  }
}

export function cosine(one, other) {
  let product = 0, ones = 0, others = 0;
  for (let i = 0; i < one.length; i++) {
    product += one[i] * other[i];
    ones += one[i] ** 2;
    others += other[i] ** 2;
  }
  return product / Math.sqrt(ones * others);
}
