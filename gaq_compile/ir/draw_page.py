"""The page around a drawn graph: pan and zoom, search, details of a clicked node. No network."""

from __future__ import annotations

from html import escape

_CSS = """
*{box-sizing:border-box}
body{margin:0;font:14px system-ui,sans-serif;color:#1f2937;overflow:hidden}
#view{position:fixed;inset:0;cursor:grab;touch-action:none;background:#fff}
#view:active{cursor:grabbing}
#view svg{width:100%;height:100%;display:block}
.node{cursor:pointer}
.node:hover>rect:first-of-type{stroke-width:2.4}
.node.picked>rect:first-of-type{stroke-width:3.4}
.node.found>rect:first-of-type{stroke:#dc2626;stroke-width:3}
.searching .node:not(.found){opacity:.25}
.wire.lit{stroke:#dc2626;stroke-width:2;opacity:1}
.wire.lit.out{stroke:#2563eb}
#bar{position:fixed;top:12px;right:12px;display:flex;gap:8px;align-items:center;background:#fffffff0;
 padding:8px;border:1px solid #e2e8f0;border-radius:10px;box-shadow:0 2px 10px #0001}
#bar input{width:230px;padding:6px 9px;border:1px solid #cbd5e1;border-radius:6px;font:inherit}
#bar button{padding:6px 10px;border:1px solid #cbd5e1;border-radius:6px;background:#f8fafc;
 font:inherit;cursor:pointer}
#count{min-width:52px;color:#64748b}
#panel{position:fixed;top:68px;right:12px;bottom:12px;width:390px;max-width:90vw;overflow:auto;
 background:#fffffff7;
 border:1px solid #e2e8f0;border-radius:10px;padding:16px;box-shadow:0 2px 14px #0002}
#panel[hidden]{display:none}
#panel h2{margin:0 24px 10px 0;font-size:17px;overflow-wrap:anywhere}
#panel h3{margin:16px 0 4px;font-size:12px;color:#64748b;font-weight:600}
#panel table{border-collapse:collapse;width:100%}
#panel td{padding:3px 8px 3px 0;vertical-align:top;overflow-wrap:anywhere}
#panel td:first-child{color:#64748b;white-space:nowrap}
#panel pre{margin:0;font:12px ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;
 overflow-wrap:anywhere}
#panel a{color:#2563eb;cursor:pointer;margin-right:8px}
#close{position:absolute;top:10px;right:12px;border:0;background:none;font-size:20px;cursor:pointer;color:#64748b}
"""

_JS = """
const data = JSON.parse(document.getElementById('data').textContent);
const view = document.getElementById('view'), svg = view.querySelector('svg');
const panel = document.getElementById('panel'), search = document.getElementById('search');
const count = document.getElementById('count');
const full = svg.viewBox.baseVal, size = {w: full.width, h: full.height};
const nodes = new Map([...svg.querySelectorAll('.node')].map(n => [n.dataset.name, n]));
svg.removeAttribute('width'); svg.removeAttribute('height');
let box = {}, hits = [], at = -1, moved = false;
const show = () => svg.setAttribute('viewBox', `${box.x} ${box.y} ${box.w} ${box.h}`);
function start() {                       // whole width, but never smaller than can be read
  const r = view.getBoundingClientRect();
  const w = Math.min(size.w, 1.9 * r.width), h = w * r.height / r.width;
  box = {x: (size.w - w) / 2, y: 0, w, h};
  if (w < size.w) box.x = 0;
  show();
}
function fit() {
  const r = view.getBoundingClientRect(), s = Math.max(size.w / r.width, size.h / r.height);
  box = {w: r.width * s, h: r.height * s};
  box.x = (size.w - box.w) / 2; box.y = (size.h - box.h) / 2; show();
}
function zoom(factor, cx, cy) {
  const r = view.getBoundingClientRect(), fx = (cx - r.left) / r.width, fy = (cy - r.top) / r.height;
  const w = Math.min(Math.max(box.w * factor, 120), 4 * Math.max(size.w, size.h)), k = w / box.w;
  box.x += fx * box.w * (1 - k); box.y += fy * box.h * (1 - k); box.w *= k; box.h *= k; show();
}
view.addEventListener('wheel', e => {
  e.preventDefault(); zoom(Math.exp(e.deltaY * 0.0015), e.clientX, e.clientY);
}, {passive: false});
const fingers = new Map(); let apart = 0;
view.addEventListener('pointerdown', e => { fingers.set(e.pointerId, e); moved = false; apart = 0; });
addEventListener('pointerup', e => fingers.delete(e.pointerId));
addEventListener('pointercancel', e => fingers.delete(e.pointerId));
addEventListener('pointermove', e => {
  const last = fingers.get(e.pointerId);
  if (!last) return;
  fingers.set(e.pointerId, e);
  if (fingers.size === 2) {
    const [a, b] = [...fingers.values()], d = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    if (apart) zoom(apart / d, (a.clientX + b.clientX) / 2, (a.clientY + b.clientY) / 2);
    apart = d; moved = true; return;
  }
  const k = box.w / view.getBoundingClientRect().width;
  if (Math.abs(e.clientX - last.clientX) + Math.abs(e.clientY - last.clientY) > 2) moved = true;
  box.x -= (e.clientX - last.clientX) * k; box.y -= (e.clientY - last.clientY) * k; show();
});
function element(tag, text, parent) {
  const e = document.createElement(tag); e.textContent = text; parent.append(e); return e;
}
function list(title, items, links) {
  if (!items.length) return;
  element('h3', title, panel);
  if (!links) { element('pre', items.join('\\n'), panel); return; }
  const p = document.createElement('div'); panel.append(p);
  for (const name of items) element('a', name, p).onclick = () => { pick(name); center(name); };
}
function pick(name) {
  svg.querySelectorAll('.picked,.lit').forEach(e => e.classList.remove('picked', 'lit', 'out'));
  panel.hidden = !name;
  if (!name) return;
  nodes.get(name).classList.add('picked');
  svg.querySelectorAll('.wire').forEach(w => {
    if (w.dataset.b === name) w.classList.add('lit');
    if (w.dataset.a === name) w.classList.add('lit', 'out');
  });
  const d = data[name];
  panel.textContent = '';
  const x = element('button', '\\u00d7', panel); x.id = 'close'; x.onclick = () => pick(null);
  element('h2', name, panel);
  const table = document.createElement('table'); panel.append(table);
  for (const [key, value] of Object.entries(d.rows)) {
    const row = table.insertRow(); element('td', key, row); element('td', value, row);
  }
  list('code', d.code); list('weights', d.weights); list('folded on the way in', d.folded);
  list('from', d.inputs, true); list('to', d.outputs, true);
}
function center(name) {
  const b = nodes.get(name).getBBox(), g = nodes.get(name).parentNode.transform.baseVal.consolidate().matrix;
  const r = view.getBoundingClientRect(), w = Math.min(box.w, 1100), h = w * r.height / r.width;
  box = {w, h, x: b.x + g.e + b.width / 2 - w / 2, y: b.y + g.f + b.height / 2 - h / 2}; show();
}
svg.addEventListener('click', e => {
  if (moved) return;
  const n = e.target.closest('.node'); pick(n ? n.dataset.name : null);
});
function find() {
  const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  hits = words.length ? [...nodes.keys()].filter(n => words.every(w => data[n].text.includes(w))) : [];
  at = -1; svg.classList.toggle('searching', words.length > 0);
  nodes.forEach((n, name) => n.classList.toggle('found', hits.includes(name)));
  count.textContent = words.length ? `${hits.length} found` : '';
}
search.addEventListener('input', find);
search.addEventListener('keydown', e => {
  if (e.key === 'Enter' && hits.length) {
    at = (at + (e.shiftKey ? -1 : 1) + hits.length) % hits.length; pick(hits[at]); center(hits[at]);
    count.textContent = `${at + 1} of ${hits.length}`;
  }
});
addEventListener('keydown', e => {
  if (e.key === 'Escape') { search.value = ''; find(); pick(null); search.blur(); }
  if (e.key === '/' && document.activeElement !== search) { e.preventDefault(); search.focus(); }
});
document.getElementById('fit').onclick = fit;
document.getElementById('top').onclick = start;
addEventListener('resize', () => { box.h = box.w * innerHeight / innerWidth; show(); });
start();
"""


def page(svg: str, details: str, title: str) -> str:
    """A self-contained HTML page.

    Args:
        svg: the drawing; its boxes are ``g.node`` with ``data-name``.
        details: JSON, what to show of each box.
        title: of the page.
    """
    # in a script element "</" would end it, whatever the JSON says
    safe = details.replace("<", "\\u003c")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body>\n"
        f'<div id="view">\n{svg}</div>\n'
        f'<div id="bar"><input id="search" type="search" placeholder="search: name, irreps, bits ( / )" '
        f'aria-label="search"><span id="count"></span>'
        f'<button id="top">start</button><button id="fit">whole</button></div>\n'
        f'<aside id="panel" hidden></aside>\n'
        f'<script type="application/json" id="data">{safe}</script>\n'
        f"<script>{_JS}</script>\n</body></html>\n"
    )
