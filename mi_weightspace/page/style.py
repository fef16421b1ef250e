"""The page's own style and script. No web font, no fetch."""

from __future__ import annotations

STYLE = """
:root{
  --ink:#222;--soft:#595959;--line:#d0d0d0;--paper:#fff;--tint:#f4f6f8;--blue:#0072B2;
  --orange:#B34700}
*{box-sizing:border-box}
body{
  margin:0 auto;max-width:1160px;padding:20px 24px 60px;color:var(--ink);
  background:var(--paper);
  font:15px/1.45 system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}
h1{font-size:24px;margin:0 0 4px}
h2{font-size:20px;margin:44px 0 8px;padding-top:12px;border-top:2px solid var(--ink)}
h3{font-size:16px;margin:26px 0 4px}
p{margin:4px 0 10px;max-width:88ch}
small,.soft{color:var(--soft)}
nav{font-size:14px;margin:14px 0}
nav div{margin:3px 0}
nav b{margin-right:12px}
figure{margin:14px 0 18px}
figcaption{font-weight:600;max-width:100ch;overflow-wrap:anywhere}
nav a{margin-right:16px}
a{color:var(--blue)}
.question{font-size:17px;margin:2px 0 14px}
.answers{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(440px,1fr))}
.answer{
  border:1px solid var(--line);border-left:6px solid var(--soft);border-radius:4px;
  padding:12px 16px;min-width:0}
.answer.found{border-left-color:var(--orange)}
.answer .group{font-weight:600;color:var(--soft)}
.verdict{font-size:22px;font-weight:650;margin:2px 0 4px;overflow-wrap:anywhere}
.verdict span{color:var(--soft);font-weight:400}
.answer p{margin:2px 0 8px}
.numbers{
  display:grid;gap:8px;margin:8px 0;grid-template-columns:repeat(auto-fit,minmax(280px,1fr))}
.number{background:var(--tint);border-radius:4px;padding:8px 12px;overflow-wrap:anywhere}
.number b{font-size:20px;margin-right:8px}
.number dl{margin:2px 0 0;font-size:13px;display:grid;grid-template-columns:auto 1fr;gap:0 8px}
.number dt{color:var(--soft)}
.number dd{margin:0}
table.stages{width:100%;white-space:normal;font-size:13px}
table.stages th{
  position:static;background:none;padding:3px 9px 3px 0;font-weight:400;color:var(--soft)}
table.stages td{padding:3px 9px 3px 0;vertical-align:top;overflow-wrap:break-word}
table.stages td:nth-child(2),table.stages th{white-space:nowrap}
.figure{width:1000px;max-width:100%;overflow-x:auto;margin:8px 0 4px}
.scroll{overflow:auto;max-height:460px;border:1px solid var(--line);margin:6px 0 12px}
table.words{white-space:normal}
table{
  border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;white-space:nowrap}
th{position:sticky;top:0;z-index:1;background:var(--tint);text-align:left;padding:0}
th button{
  font:inherit;font-weight:600;border:0;background:none;padding:5px 9px;cursor:pointer;
  color:inherit;white-space:nowrap}
th[aria-sort=ascending] button::after{content:' ▲'}
th[aria-sort=descending] button::after{content:' ▼'}
td{padding:3px 9px;border-top:1px solid #ececec}
td.n{text-align:right}
tbody tr:hover{background:var(--tint)}
summary{cursor:pointer;padding:4px 0;font-weight:600}
summary small{font-weight:400}
code,pre{font:13px/1.45 ui-monospace,'DejaVu Sans Mono',monospace}
pre{
  background:var(--tint);padding:10px 12px;overflow-x:auto;white-space:pre-wrap;
  overflow-wrap:anywhere}
.reservations li{margin:3px 0;max-width:96ch}
.none{color:var(--soft);font-style:italic}
@page{size:A4 landscape;margin:8mm}
@media print{
body{max-width:none;padding:0;font-size:12px}
nav,.screen{display:none}
h2{break-after:avoid;margin-top:24px}
h2.first{break-before:page;margin-top:0;border:0}
figure,.keep,.answer,.number,tr{break-inside:avoid}
.x{display:none}
th button::after{content:none !important}
.scroll{max-height:none;overflow:visible;border:0}
.figure{overflow:visible}
table{font-size:9px}
td,th button{padding:2px 4px}
th{position:static}
.verdict{font-size:18px}
.number b{font-size:16px}
h3,summary{break-after:avoid}
}
"""

SCRIPT = """
(function(){
"use strict";
var data=document.getElementById("figures");
if(data&&window.Plotly){JSON.parse(data.textContent).forEach(function(f){
var at=document.getElementById(f.id);
if(at){Plotly.newPlot(at,f.figure.data,f.figure.layout,{displayModeBar:false,responsive:false});}});}
function key(row,i){var c=row.cells[i],v=c.getAttribute("data-v");
if(v===null){return c.textContent;}return v===""?-Infinity:parseFloat(v);}
document.querySelectorAll("table.sortable").forEach(function(table){
Array.prototype.forEach.call(table.tHead.rows[0].cells,function(head,i){
head.firstChild.addEventListener("click",function(){
var down=head.getAttribute("aria-sort")!=="descending";
Array.prototype.forEach.call(table.tHead.rows[0].cells,function(h){h.setAttribute("aria-sort","none");});
head.setAttribute("aria-sort",down?"descending":"ascending");
var rows=Array.prototype.slice.call(table.tBodies[0].rows);
rows.sort(function(a,b){var x=key(a,i),y=key(b,i),o=0;
if(typeof x==="string"||typeof y==="string"){
o=String(x).localeCompare(String(y),undefined,{numeric:true});}
else{o=x<y?-1:x>y?1:0;}return down?-o:o;});
rows.forEach(function(r){table.tBodies[0].appendChild(r);});});});});
})();
"""
