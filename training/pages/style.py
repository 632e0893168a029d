"""The stylesheet of the pages: no files, no fonts, no scripts; light and dark."""

STYLE = """
:root{--page:#fbfbfa;--card:#fff;--ink:#1d2024;--soft:#646b75;--line:#e3e5e8;--accent:#1f6f8b;--muted:#a9b0b8;
--good:#1b7f4d;--bad:#b3403a;--c-waad:31 111 190;--c-fai:196 125 9;--c-gamma:196 52 96}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1b1f23;--ink:#e7e9ec;--soft:#9aa3ad;--line:#2d3339;
--accent:#5fb7d4;--muted:#69727c;--good:#5cc48f;--bad:#e88a83;--c-waad:92 160 235;--c-fai:236 178 74;
--c-gamma:240 112 152}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1060px;margin:0 auto;padding:40px 24px 72px}
.kicker{margin:0;color:var(--soft);font-size:14px}
h1{margin:4px 0 8px;font-size:32px;line-height:1.2;letter-spacing:-.01em}
h2{margin:0 0 14px;font-size:20px;letter-spacing:-.005em}
.lead{margin:0 0 22px;font-size:18px;max-width:46em}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:22px 24px;margin-top:20px}
section>p{max-width:58em}
.note{color:var(--soft);font-size:14px;margin:12px 0 0;max-width:66em!important}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;margin:0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.tiles dt{color:var(--soft);font-size:14px}
.tiles dd{margin:2px 0 0;font-size:22px;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 0 6px 18px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:500;font-size:14px;white-space:normal;vertical-align:bottom}
.scroll+.scroll,.note+.scroll,.figures+.scroll{margin-top:18px}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;min-width:9em}
tbody tr:last-child td{border-bottom:0}
thead:not(:has(th:not(:empty))){display:none}
figure{margin:0}
figure.wide{max-width:760px}
figcaption{color:var(--soft);font-size:14px;padding-left:42px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:18px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:11px system-ui,sans-serif;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .name{font-size:14px;fill:var(--ink)}
svg .value{font-size:13px;fill:var(--ink)}
.grid{stroke:var(--line);stroke-width:1}
.mean{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}
.dot{fill:var(--accent);fill-opacity:.5}
.band{fill:var(--accent);fill-opacity:.14}
.before .bar{fill:var(--muted);fill-opacity:.55}
.after .bar{fill:var(--accent);fill-opacity:.8}
.point{fill:var(--accent)}
.seed{fill:var(--card);stroke:var(--accent);stroke-width:1.5}
.zero{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 12px;padding:0}
.key li::before{content:"";display:inline-block;width:18px;height:3px;border-radius:2px;background:var(--accent);
margin-right:8px;vertical-align:4px}
.whisker{stroke:var(--ink);stroke-width:1.2}
.s0{--accent:#1f6f8b}.s1{--accent:#c47d09}.s2{--accent:#8a4fbf}.s3{--accent:#1b7f4d}.s4{--accent:#c43460}
input[type=radio]{position:absolute;opacity:0;pointer-events:none}
.examples>label{display:inline-block;padding:4px 12px;margin:0 6px 12px 0;border:1px solid var(--line);
border-radius:999px;cursor:pointer;font-variant-numeric:tabular-nums}
.examples>input:checked+label{background:var(--ink);color:var(--card);border-color:var(--ink)}
input:focus-visible+label{outline:2px solid var(--accent);outline-offset:2px}
.legend>label{display:block;width:fit-content;padding:2px 10px 2px 6px;border-radius:6px;cursor:pointer;font-size:14px;
color:var(--soft)}
.legend>input:checked+label{background:var(--line);color:var(--ink)}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:8px;vertical-align:-1px}
.swatch.waad{background:rgb(var(--c-waad))}.swatch.fai{background:rgb(var(--c-fai))}
.swatch.gamma{background:rgb(var(--c-gamma))}
.example{display:none}
#e0:checked~.legend .x0,#e1:checked~.legend .x1,#e2:checked~.legend .x2{display:block}
.prompt{margin:14px 0 8px}
.prompt.was{color:var(--soft);font-size:14px}
code,pre,.t b{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:13px}
.right{color:var(--good)}.wrong{color:var(--bad)}
.tape{display:flex;flex-wrap:wrap;gap:16px 2px;padding:4px 0}
.t{display:block;min-width:23px}
.t b{display:block;text-align:center;font-weight:500;padding:1px 4px;border-radius:4px;white-space:pre}
#by-gamma:checked~.example .t b{background:rgb(var(--c-gamma)/calc(var(--g)*.55))}
#by-waad:checked~.example .t b{background:rgb(var(--c-waad)/calc(var(--w)*.55))}
#by-fai:checked~.example .t b{background:rgb(var(--c-fai)/calc(var(--f)*.6))}
.t i{display:block;height:20px;margin-top:2px;border-bottom:1px solid var(--line)}
.t .waad{background:linear-gradient(to top,rgb(var(--c-waad)) calc(var(--w)*100%),transparent 0)}
.t .fai{background:linear-gradient(to top,rgb(var(--c-fai)) calc(var(--f)*100%),transparent 0)}
.t .gamma{background:linear-gradient(to top,rgb(var(--c-gamma)) calc(var(--g)*100%),transparent 0)}
details{margin-top:8px}summary{cursor:pointer;color:var(--soft)}
pre{overflow-x:auto;background:var(--page);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
@media print{section{break-inside:avoid}}
"""
