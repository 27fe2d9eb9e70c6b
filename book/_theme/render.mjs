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

function cell(node, context) {
  const tag = node.header && node.children?.length ? "th" : "td"; // an empty head names nothing
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
  blockquote: element("blockquote"),
  break: () => "<br>",
  caption: element("figcaption"),
  captionNumber: (node) => `<b>${escape(plain(node)).replace(/:$/, ".")}</b> `,
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
  explorer,
  glossary,
  heading,
  html: (node) => node.value,
  image,
  inlineCode: (node) => `<code>${escape(node.value)}</code>`,
  inlineMath: (node) => node.html ?? escape(node.value),
  link: (node, context) => `<a href="${escape(href(node.url, context))}">${children(node, context)}</a>`,
  list: (node, context) =>
    node.ordered
      ? `<ol start="${node.start ?? 1}">${children(node, context)}</ol>`
      : `<ul>${children(node, context)}</ul>`,
  listItem: element("li"),
  math,
  mystTarget: (node) => `<span${id(node)}></span>`,
  paragraph,
  setExplorer,
  span: element("span"),
  strong: element("strong"),
  subscript: element("sub"),
  summary: element("summary"),
  superscript: element("sup"),
  table: (node, context) => scrolling(element("table")(node, context)),
  tableCell: cell,
  tableRow: element("tr"),
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
