// Pictures as files: their size, a thumbnail, and a PNG without what is written into it.

const THUMB_SIDE_PX = 144;

// The chunks that say how a picture came about; the others are needed to show it.
const METADATA_CHUNKS = new Set(["tEXt", "zTXt", "iTXt", "eXIf", "tIME"]);
const PNG_SIGNATURE_BYTES = 8;
const CHUNK_OVERHEAD_BYTES = 12; // length, type and checksum

/** Width and height as shown, and a small JPEG. Throws if this browser cannot show it. */
export async function inspect(blob) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  const scale = Math.min(1, THUMB_SIDE_PX / Math.max(width, height));
  const canvas = Object.assign(document.createElement("canvas"), {
    width: Math.max(1, Math.round(width * scale)),
    height: Math.max(1, Math.round(height * scale)),
  });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return { width, height, thumb: await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.8)) };
}

/** The same PNG, pixel data untouched, without its metadata. */
export async function withoutMetadata(png) {
  const bytes = new DataView(await png.arrayBuffer());
  const kept = [png.slice(0, PNG_SIGNATURE_BYTES)];
  for (let at = PNG_SIGNATURE_BYTES; at < bytes.byteLength; ) {
    const end = at + CHUNK_OVERHEAD_BYTES + bytes.getUint32(at);
    const type = String.fromCharCode(...[4, 5, 6, 7].map((i) => bytes.getUint8(at + i)));
    if (!METADATA_CHUNKS.has(type)) kept.push(png.slice(at, end));
    at = end;
  }
  return new Blob(kept, { type: "image/png" });
}

export function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may not have begun to read it
}
