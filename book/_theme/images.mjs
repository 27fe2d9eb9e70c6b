// Images with their sizes: a page keeps their places free, and nothing on it moves away from under a
// reader's finger when an image that was far down is loaded.

const PIXELS = { pt: 4 / 3, px: 1, "": 1 };

// [width, height], in pixels of the page, of a PNG or an SVG; [] of other kinds.
function size(bytes) {
  if (bytes.subarray(1, 4).toString() === "PNG") return [bytes.readUInt32BE(16), bytes.readUInt32BE(20)];
  const root = /<svg[^>]*>/.exec(bytes.toString())?.[0] ?? "";
  const sides = ["width", "height"].map((name) => new RegExp(`\\s${name}="([\\d.]+)(pt|px|)"`).exec(root));
  return sides.every(Boolean) ? sides.map(([, length, unit]) => Math.round(length * PIXELS[unit])) : [];
}

async function measured(tag, read) {
  const [, address] = /src="([^"]*)"/.exec(tag);
  const [width, height] = size(await read(address));
  return width ? tag.replace(/>$/, ` width="${width}" height="${height}">`) : tag;
}

// `html` with the size of each image in it; `read` gives the bytes at an address.
export async function sized(html, read) {
  const tags = html.match(/<img [^>]*>/g) ?? [];
  const written = await Promise.all(tags.map((tag) => measured(tag, read)));
  return html.replace(/<img [^>]*>/g, () => written.shift());
}
