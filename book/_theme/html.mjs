// Small pieces of HTML, and of the addresses in it.
export const escape = (text) =>
  String(text ?? "").replace(
    /[&<>"]/g,
    (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c],
  );

// HTML whose texts show the index of A_KA and A_ZS set low; what is copied or read aloud keeps "_".
export const indexed = (html) =>
  html.replace(/(?<=^|>)[^<]+/g, (text) => text.replace(/_(KA|ZS)\b/g, '<span class="hidden">_</span><sub>$1</sub>'));

export const plain = (node) => node.value ?? (node.children ?? []).map(plain).join("");

export function id(node) {
  const name = node.html_id ?? node.identifier;
  return name ? ` id="${escape(name)}"` : "";
}

// Addresses: of pages of this book, below the site's base; of built files, below MyST's folder.
export const href = (url, { base }) => (url?.startsWith("/") ? base + url : (url ?? ""));
export const source = (url, { assets }) => (url?.startsWith("/") ? assets + url : (url ?? ""));

// What is wider than the page scrolls by itself; book.js lets the keyboard scroll it, too.
export const scrolling = (inner, kind = "wide") => `<div class="${kind}">${inner}</div>`;
