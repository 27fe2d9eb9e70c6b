// MyST's tree of a page as HTML: a function a kind of node, each given the node and the page's
// context {page, slug, base, assets, ...}. Cells and their outputs are in notebook.mjs.
import { escape, href, id, indexed, plain, scrolling, source } from "./html.mjs";
import { definitions } from "./glossary.mjs";
import { cells } from "./notebook.mjs";

const DEFINITIONS = definitions();

const children = (node, context) => (node.children ?? []).map((each) => render(each, context)).join("");

const element =
  (tag, attributes = "") =>
  (node, context) =>
    `<${tag}${id(node)}${attributes}>${children(node, context)}</${tag}>`;

function heading(node, context) {
  const number = node.enumerator ? `<span class="number">${escape(node.enumerator)}</span> ` : "";
  const label = escape(`Link to ${plain(node)}`);
  const anchor = `<a class="anchor" href="#${escape(node.html_id)}" aria-label="${label}">#</a>`;
  return `<h${node.depth}${id(node)}>${number}${children(node, context)}${anchor}</h${node.depth}>`;
}

function listItem(node, context) {
  const box =
    node.checked == null
      ? ""
      : `<input type="checkbox" disabled ${node.checked ? "checked" : ""} aria-label="done">`;
  return `<li>${box}${children(node, context)}</li>`;
}

function crossReference(node, context) {
  const here = !node.remote || node.url === `/${context.slug}`;
  const target = `${here ? "" : escape(href(node.url, context))}#${escape(node.html_id ?? node.identifier)}`;
  const term = node.kind === "definitionTerm" || node.identifier?.startsWith("term-");
  const words = term ? DEFINITIONS[node.identifier] : null;
  const hover = words ? ` data-definition="${escape(words)}"` : "";
  return `<a class="reference${term ? " term" : ""}" href="${target}"${hover}>${children(node, context)}</a>`;
}

// A chapter writes the caption of a figure as "**Figure 4.1.** What it shows."
function paragraph(node, context) {
  const [first] = node.children ?? [];
  const isCaption = first?.type === "strong" && /^Figure [\w.]+\.$/.test(plain(first));
  return element("p", isCaption ? ' class="caption"' : "")(node, context);
}

const terms = (node) => (node.type === "definitionTerm" ? [node] : (node.children ?? []).flatMap(terms));

// The terms, below a link to the first of each letter.
function glossary(node, context) {
  const firsts = new Map(terms(node).reverse().map((each) => [plain(each)[0].toUpperCase(), each]));
  const links = [...firsts].reverse().map(
    ([letter, term]) => `<a href="#${escape(term.html_id ?? term.identifier)}">${escape(letter)}</a>`,
  );
  const letters = `<nav class="letters" aria-label="First letters">${links.join(" ")}</nav>`;
  return `${letters}<div class="glossary">${children(node, context)}</div>`;
}

function image(node, context) {
  const width = node.width ? ` style="width:${escape(node.width)}"` : "";
  return `<img class="figure" src="${escape(source(node.url, context))}" alt="${escape(node.alt)}"${width}>`;
}

function math(node) {
  const number = node.enumerator ? `<span class="number">(${escape(node.enumerator)})</span>` : "";
  return `<div class="equation"${id(node)}>${scrolling(node.html ?? escape(node.value), "math")}${number}</div>`;
}

// A summary folds and unfolds where it is clicked: it holds no links.
function unlinked(node) {
  if (!node.children) return node;
  const inner = node.children.map(unlinked);
  const links = ["link", "crossReference", "cite"];
  return { ...node, children: inner.flatMap((each) => (links.includes(each.type) ? each.children : [each])) };
}

const folded = (node) => node.open === false || /\bdropdown\b/.test(node.class ?? "");

function box(kind, prefix = "", closed = folded) {
  return (node, context) => {
    const title = (node.children ?? []).find((each) => each.type === "admonitionTitle");
    const words = prefix + (node.enumerator ? ` ${node.enumerator}` : "");
    const shut = closed(node);
    const named = title ? children(shut ? unlinked(title) : title, context) : "";
    const head = [escape(words.trim()), named].filter((part) => part).join(": ") || escape(node.kind ?? kind);
    const body = children({ children: (node.children ?? []).filter((each) => each !== title) }, context);
    const looks = `class="box ${escape(kind)} ${escape(node.kind ?? "")}"${id(node)}`;
    if (shut) return `<details ${looks}><summary>${head}</summary>${body}</details>`;
    return `<div role="note" ${looks}><p class="title">${head}</p>${body}</div>`;
  };
}

function tabs(node, context) {
  const group = `tabs${(context.tabs = (context.tabs ?? 0) + 1)}`;
  const names = node.children.map((each) => each.title ?? plain(each));
  const buttons = names.map(
    (name, n) =>
      `<button role="tab" id="${group}-${n}" aria-controls="${group}-${n}-panel" aria-selected="${n === 0}" ` +
      `tabindex="${n ? -1 : 0}">${escape(name)}</button>`,
  );
  const panels = node.children.map(
    (each, n) =>
      `<div role="tabpanel" id="${group}-${n}-panel" aria-labelledby="${group}-${n}" tabindex="0">` +
      `<p class="print-only"><b>${escape(names[n])}</b></p>${children(each, context)}</div>`,
  );
  return `<div class="tabs"><div role="tablist">${buttons.join("")}</div>${panels.join("")}</div>`;
}

const isEmpty = ({ children = [] }) => children.length === 0;

function row(node, context) {
  return node.children.every((each) => each.header && isEmpty(each)) ? "" : element("tr")(node, context);
}

function cell(node, context) {
  const tag = node.header && !isEmpty(node) ? "th" : "td"; // an empty head names nothing
  const spans = ["colspan", "rowspan"].filter((key) => node[key] > 1).map((key) => ` ${key}="${node[key]}"`);
  const align = node.align ? ` style="text-align:${escape(node.align)}"` : "";
  return `<${tag}${spans.join("")}${align}>${children(node, context)}</${tag}>`;
}

function citation(node, context) {
  const known = context.page.references?.cite?.data?.[node.label];
  const title = known ? ` title="${escape(known.html.replace(/<[^>]+>/g, ""))}"` : "";
  return `<a class="citation" href="#cite-${escape(node.identifier)}"${title}>${children(node, context)}</a>`;
}

function citations(node, context) {
  const parts = node.children.map((each) => render(each, context));
  return node.kind === "narrative" ? parts.join("; ") : `(${parts.join("; ")})`;
}

// A place on a page that no cell draws.
function explorer(node, context) {
  context.answers = true;
  const still = children(node, context) || "<p>This explorer needs JavaScript.</p>";
  return `<div class="answering" data-explorer="${escape(node.name)}"><noscript>${still}</noscript></div>`;
}

// A link that sets an explorer of the page; book.js and the explorer follow the address.
function setExplorer(node, context) {
  const address = new URLSearchParams({ explorer: node.name, state: node.state });
  return `<a class="sets" href="#${escape(address)}">${children(node, context)}</a>`;
}

// A large link in the colour of its chapter.
const door = (node, context) => `<div data-chapter="${escape(node.number)}">${children(node, context)}</div>`;

const kinds = {
  ...cells,
  abbreviation: (node, context) => `<abbr title="${escape(node.title)}">${children(node, context)}</abbr>`,
  admonition: box("admonition"),
  admonitionTitle: children,
  aside: element("aside"),
  blockquote: element("blockquote"),
  break: () => "<br>",
  caption: element("figcaption"),
  captionNumber: (node) => `<b>${escape(plain(node)).replace(/:$/, ".")}</b> `,
  card: element("div", ' class="card"'),
  cite: citation,
  citeGroup: citations,
  comment: () => "",
  container: (node, context) =>
    `<figure${id(node)} class="${escape(node.kind)}">${children(node, context)}</figure>`,
  crossReference,
  definitionDescription: element("dd"),
  definitionList: element("dl"),
  definitionTerm: element("dt"),
  delete: element("del"),
  details: element("details", ' class="box"'),
  door,
  doors: (node, context) => `<div class="doors">${children(node, context)}</div>`,
  emphasis: element("em"),
  exercise: box("exercise", "Exercise"),
  explorer,
  footer: element("footer"),
  footnoteDefinition: (node, context) =>
    `<div class="footnote" id="fn-${escape(node.identifier)}"><sup>${escape(node.enumerator)}</sup>${children(node, context)}</div>`,
  footnoteReference: (node) =>
    `<sup><a href="#fn-${escape(node.identifier)}" aria-label="Footnote ${escape(node.enumerator)}">${escape(node.enumerator)}</a></sup>`,
  glossary,
  grid: element("div", ' class="grid"'),
  header: element("header"),
  heading,
  html: (node) => node.value,
  image,
  inlineCode: (node) => `<code>${escape(node.value)}</code>`,
  inlineMath: (node) => node.html ?? escape(node.value),
  legend: element("div", ' class="legend"'),
  link: (node, context) => `<a href="${escape(href(node.url, context))}">${children(node, context)}</a>`,
  list: (node, context) =>
    node.ordered
      ? `<ol start="${node.start ?? 1}">${children(node, context)}</ol>`
      : `<ul>${children(node, context)}</ul>`,
  listItem,
  math,
  mystTarget: (node) => `<span${id(node)}></span>`,
  paragraph,
  proof: box("proof", "Proof"),
  setExplorer,
  solution: box("solution", "Solution", () => true),
  span: element("span"),
  strong: element("strong"),
  subscript: element("sub"),
  summary: element("summary"),
  superscript: element("sup"),
  tabItem: children,
  tabSet: tabs,
  table: (node, context) => scrolling(element("table")(node, context)),
  tableCell: cell,
  tableRow: row,
  text: (node) => indexed(escape(node.value)),
  thematicBreak: () => "<hr>",
};

const unknown = new Set();

export function render(node, context) {
  context.render ??= (each) => render(each, context); // for the cells, which hold any kind of node
  const how = kinds[node.type];
  if (how) return how(node, context);
  if (!unknown.has(node.type)) {
    unknown.add(node.type);
    console.error(`theme: nothing renders a node of type ${node.type}; its text is shown`);
  }
  return node.children ? children(node, context) : escape(node.value);
}
