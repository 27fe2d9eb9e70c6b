// Cells of a notebook and their outputs.
import fs from "node:fs";
import hljs from "./vendor/highlight.mjs";
import { escape, id, indexed, scrolling, source } from "./html.mjs";

const LONG = 12; // lines of a cell without outputs beyond which it is folded
const SHELLS = ["bash", "sh", "shell", "console"];
const figures = new URL("./data/figures.json", import.meta.url);
// Function that draws -> what its figure shows, written by `cmpt site`.
const SHOWS = fs.existsSync(figures) ? JSON.parse(fs.readFileSync(figures)) : {};

const children = (node, context) => (node.children ?? []).map(context.render).join("");

// In a shell's lines, only strings and comments: its keywords are words of commands, too.
function coloured(code, language) {
  if (!hljs.getLanguage(language ?? "")) return escape(code);
  const { value } = hljs.highlight(code, { language });
  if (!SHELLS.includes(language)) return value;
  return value.replace(/<span class="hljs-(?:keyword|built_in)">(.*?)<\/span>/g, "$1");
}

const printed = (text) => `<pre class="stream">${escape(text)}</pre>`;

const folded = (words, shown) => `<details class="folded"><summary>${words}</summary>${shown}</details>`;

function code(node) {
  const inner = `<pre><code>${coloured(node.value, node.lang)}</code></pre>`;
  const shown = `<div class="code"${id(node)}>${inner}</div>`;
  const lines = node.value.split("\n").length;
  return node.visibility === "hide" ? folded(`Code, ${lines} line${lines === 1 ? "" : "s"}`, shown) : shown;
}

function block(node, context, long = LONG) {
  if (node.kind !== "notebook-code") return `<div class="block"${id(node)}>${children(node, context)}</div>`;
  const [cell, outputs] = ["code", "outputs"].map((type) => node.children.find((each) => each.type === type));
  const bare = !outputs?.children?.length;
  const folds = bare && cell?.value.split("\n").length > long;
  context.cell = cell?.value ?? "";
  const parts = node.children.map((each) =>
    each === cell && folds ? code({ ...cell, visibility: "hide" }) : context.render(each),
  );
  return `<div class="block cell"${id(node)}>${parts.join("")}</div>`;
}

// A chapter begins with its parameters, its imports, and what is stored of its runs: one fold for all.
const isSetUp = ({ kind, data, children: parts = [] }) => {
  if (kind !== "notebook-code") return false;
  const [cell, shown] = ["code", "outputs"].map((type) => parts.find((each) => each.type === type));
  const prints = (shown?.children ?? []).every((each) => each.jupyter_data?.output_type === "stream");
  return data?.tags?.includes("parameters") || (cell?.visibility === "hide" && prints);
};
const asShown = (cell) => ({
  ...cell,
  children: cell.children.map((each) => (each.type === "code" ? { ...each, visibility: "show" } : each)),
});

// A section that JupyterLab opens folded is folded here, too: the chapter's last one, its evidence.
const isFolded = ({ data, children: parts = [] }) =>
  data?.["jp-MarkdownHeadingCollapsed"] === true && parts[0]?.type === "heading";

function section([first, ...rest], context) {
  const [heading, ...body] = first.children;
  const title = `<h${heading.depth}${id(heading)}>${children(heading, context)}</h${heading.depth}>`;
  const words = `<summary>${title}<span>Intervals, controls and tables</span></summary>`;
  const inner = blocks([{ ...first, children: body }, ...rest], context);
  return `<details class="evidence">${words}${inner}</details>`;
}

function root(node, context) {
  const all = node.children ?? [];
  const at = all.findIndex(isFolded);
  if (at < 0) return blocks(all, context);
  return blocks(all.slice(0, at), context) + section(all.slice(at), context);
}

function blocks(nodes, context) {
  const parts = [];
  for (const each of nodes) {
    if (!isSetUp(each)) parts.push(context.render(each));
    else if (Array.isArray(parts.at(-1))) parts.at(-1).push(each);
    else parts.push([each]);
  }
  return parts.map((part) => (Array.isArray(part) ? setUp(part, context) : part)).join("");
}

function setUp(cells, context) {
  const first = cells.some(({ data }) => data?.tags?.includes("parameters"));
  const words = first ? "Set-up: parameters, imports, and what is stored" : "Code and its log";
  const inner = cells.map((each) => block(asShown(each), context, Infinity)).join("");
  return `<div class="block cell set-up">${folded(words, inner)}</div>`;
}

function outputs(node, context) {
  if (!node.children?.length) return "";
  // An explorer's still has its picture inside its box.
  const still = /(<div class="answering"[^>]*>)(.*?)<\/div>(<figure.*?<\/figure>)/s;
  const shown = `<div class="outputs">${children(node, context).replace(still, "$1$3$2</div>")}</div>`;
  return node.visibility === "hide" ? folded("Output", shown) : shown;
}

function picture(data, context) {
  const called = [...context.cell.matchAll(/(\w+)\(/g)].map(([, name]) => name);
  const alt = SHOWS[called.findLast((name) => name in SHOWS)] ?? "Figure";
  const address = escape(source(data["image/png"].path, context));
  const img = `<img src="${address}" alt="${escape(alt)}" loading="lazy">`;
  // Wide figures are small beside a text: a click shows them in full size.
  return `<figure class="drawn"><a href="${address}" title="In full size">${img}</a></figure>`;
}

const NUMBER = /^(?:[\s\d.,:%±+\-−–()eE/]|to|nan|NaN|inf)*$/;
const LONG_WORDS = 30; // characters of a cell of words from which its column wraps
const text = (cell) => cell.replace(/<[^>]*>/g, "");

// Columns of words stand at the left and wrap; numbers stand at the right, as frames have them. Each
// cell knows its column's head, which stands before it on a phone.
function aligned(content) {
  const rows = content.match(/<tr[\s\S]*?<\/tr>/g) ?? [];
  const cells = rows.map((row) => row.match(/<t[dh][\s\S]*?<\/t[dh]>/g) ?? []);
  const kinds = new Map(); // of columns of words, counted from the right
  for (const row of cells)
    for (const [n, cell] of row.entries()) {
      if (!/^<td/.test(cell) || NUMBER.test(text(cell))) continue;
      if (kinds.get(n - row.length) !== "words long")
        kinds.set(n - row.length, text(cell).length > LONG_WORDS ? "words long" : "words");
    }
  const heads = /<thead/.test(content) ? cells[0].map((cell) => text(cell).replace(/"/g, "&quot;")) : [];
  const marked = (cell, at) => {
    const kind = kinds.has(at) ? ` class="${kinds.get(at)}"` : "";
    const head = /^<td/.test(cell) && heads.at(at) ? ` data-head="${heads.at(at)}: "` : "";
    return cell.replace(/^<t[dh]/, `$&${kind}${head}`);
  };
  const written = rows.map((row, r) =>
    cells[r].reduce(
      (all, cell, n) => all.replace(cell, () => marked(cell, n - cells[r].length)),
      row,
    ),
  );
  return rows
    .reduce((all, row, r) => all.replace(row, () => written[r]), content)
    .replace(/<th( [^>]*)?><\/th>/g, "<td></td>");
}

// A frame's index has its name in a row of its own, below the columns': here it stands beside them.
function beside(content) {
  const [head] = /<thead>[\s\S]*?<\/thead>/.exec(content) ?? [];
  const rows = head?.match(/<tr[\s\S]*?<\/tr>/g) ?? [];
  if (rows.length !== 2) return content;
  const cells = rows.map((row) => row.match(/<th[\s\S]*?<\/th>/g) ?? []);
  const words = cells.map((row) => row.map((cell) => text(cell).trim()));
  const names = words[1].findLastIndex(Boolean) + 1;
  if (!names || words[0].length !== words[1].length || words[0].slice(0, names).some(Boolean)) return content;
  const joined = [...cells[1].slice(0, names), ...cells[0].slice(names)].join("");
  return content.replace(head, `<thead><tr>${joined}</tr></thead>`);
}

const TALL = 40; // rows of a table beyond which it scrolls in a box of its own

function table(content) {
  const extras = / border="\d"|<style scoped>[\s\S]*?<\/style>|<p>\d+ rows × \d+ columns<\/p>/g;
  const bare = indexed(beside(content.replace(extras, "")));
  const rows = bare.match(/<tr/g)?.length ?? 0;
  return scrolling(aligned(bare), rows > TALL ? "wide html tall" : "wide html");
}

// An explorer's still stands as it is; the page's script puts the explorer in its place.
function html(content, context) {
  if (/class="answering"/.test(content)) {
    const answers = /data-explorer="/.test(content);
    context.answers ||= answers;
    // the name by which the top of the page leads to it
    return answers ? content.replace(/data-explorer="(\w+)"/, 'id="try-$1" $&') : indexed(content);
  }
  if (/class="(?:recall|verdict)\b/.test(content)) return indexed(content);
  if (!/class="highlight"/.test(content)) return table(content);
  // The colours are the theme's, for light and dark.
  const bare = content.replace(/<style[\s\S]*?<\/style>/, "");
  return `<div class="code listing">${bare}</div>`;
}

function output(node, context) {
  const found = node.jupyter_data;
  if (!found) return children(node, context);
  if (found.output_type === "stream") return printed(found.text ?? "");
  const data = found.data ?? {};
  if (data["image/png"]) return picture(data, context);
  if (data["text/html"]) return html(data["text/html"].content ?? "", context);
  const words = data["text/plain"]?.content ?? "";
  return words && printed(words);
}

export const cells = { block: (node, context) => block(node, context), code, output, outputs, root };
