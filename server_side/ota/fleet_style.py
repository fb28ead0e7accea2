"""The style sheet of a fleet's page: two sets of colours, one layout that folds for narrow screens."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#f5f7f9;--panel:#fff;--ink:#1a2733;--quiet:#5b6b79;--line:#dde4ea;--track:#edf1f4;
--good:#1a7f5a;--busy:#3f86e0;--lost:#c77700;--bad:#c4342d;--bad2:#e0685f;--wait:#b9c4cd;--mute:#d9e0e5;
--r0:#1f5fbf;--r1:#8fa3b5;--r2:#0f8b8d;--r3:#c77700;--r4:#7b4fb5;--r5:#b9c4cd;
--stop:#fbe5e3;--stopi:#9c241e;--hold:#fdf0da;--holdi:#8a5300;--go:#e0f2ea;--goi:#13623f}
@media (prefers-color-scheme:dark){:root{--bg:#11171d;--panel:#1a2229;--ink:#e3e9ee;--quiet:#96a5b2;--line:#2c3843;
--track:#232d36;--good:#35a97c;--busy:#4f95ec;--lost:#dd9226;--bad:#e0554d;--bad2:#b8463f;--wait:#546472;--mute:#3a4752;
--r0:#5b9af0;--r1:#6d8195;--r2:#2fb0b2;--r3:#dd9226;--r4:#a27fdb;--r5:#4a5865;
--stop:#4a2220;--stopi:#ffb4ae;--hold:#46351a;--holdi:#ffd28a;--go:#173b2d;--goi:#8fe0bd}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 56px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.25rem;margin:36px 0 10px;overflow-wrap:anywhere}
h3{font-size:1rem;margin:0 0 6px}
p{margin:0 0 10px}
em{font-style:normal;color:var(--quiet)}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}
.lead,.note,.foot{color:var(--quiet)}
.note{font-size:.88rem;margin:8px 0 0}
.foot{font-size:.88rem;margin-top:36px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(158px,1fr));gap:12px;margin:20px 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.card b{display:block;font-size:1.3rem;line-height:1.3;white-space:nowrap;font-variant-numeric:tabular-nums}
.card span{color:var(--quiet);font-size:.88rem;line-height:1.3;display:block}
.card.bad b{color:var(--bad)}.card.warn b{color:var(--lost)}
.notice{background:var(--hold);color:var(--holdi);border-radius:10px;padding:10px 14px;overflow-wrap:anywhere}
.panel{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:16px;margin:0 0 14px}
.rollout{overflow-wrap:anywhere}
.tag{display:inline-block;border-radius:6px;padding:1px 8px;font-size:.85rem;font-weight:600;white-space:nowrap}
.stop{background:var(--stop);color:var(--stopi)}.hold{background:var(--hold);color:var(--holdi)}
.go{background:var(--go);color:var(--goi)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.86rem;margin:0 0 10px;font-variant-numeric:tabular-nums}
.legend i,.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.line{display:grid;grid-template-columns:minmax(90px,180px) 1fr 215px;gap:12px;align-items:center;
padding:4px 0;font-size:.93rem;font-variant-numeric:tabular-nums}
.line.total{font-weight:600;border-bottom:1px solid var(--line);padding-bottom:8px;margin-bottom:4px}
.name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar{display:flex;height:16px;border-radius:4px;overflow:hidden;background:var(--track);gap:1px}
.bar i{flex:0 1 0;min-width:2px}
.bar.none{height:2px}
.right{text-align:right;white-space:nowrap}
.right em{font-weight:400;margin-left:10px}
.good{background:var(--good)}.busy{background:var(--busy)}.lost{background:var(--lost)}
.bar .bad,i.bad{background:var(--bad)}
.bad2{background:var(--bad2)}.wait{background:var(--wait)}.mute{background:var(--mute)}
.r0{background:var(--r0)}.r1{background:var(--r1)}.r2{background:var(--r2)}.r3{background:var(--r3)}
.r4{background:var(--r4)}.r5{background:var(--r5)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{color:var(--quiet);font-weight:600}
tr:last-child td{border-bottom:0}
td.n{text-align:left}
td.text{white-space:normal;min-width:160px;overflow-wrap:anywhere}
details{border-bottom:1px solid var(--line);padding:8px 0}
details:last-child{border-bottom:0}
summary{cursor:pointer}
.folds{padding:6px 16px}
svg{display:block;width:100%}
.strip{margin:0 0 14px}
.strip p{margin:0 0 4px;font-size:.9rem;overflow-wrap:anywhere}
.axis{position:relative;height:18px;color:var(--quiet);font-size:.78rem}
.axis span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.axis span:first-child{transform:none}
.ends{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 12px;color:var(--quiet);font-size:.78rem}
@media (max-width:640px){main{padding:18px 12px 40px}.panel{padding:12px}
.cards{grid-template-columns:1fr 1fr;gap:8px}.card b{font-size:1.2rem}
.line{grid-template-columns:1fr auto;gap:2px 10px;padding:6px 0}.bar{grid-column:1/3;grid-row:2}
table,tbody,tr,td{display:block}th{display:none}tr{padding:8px 0;border-bottom:1px solid var(--line)}
tr:last-child{border-bottom:0}td,td.n{border:0;padding:1px 0;text-align:left;white-space:normal;display:inline-block;
margin-right:10px}td.text{display:block;min-width:0}tr:has(th){display:none}}
@media print{body{background:#fff}details>*{display:block}}
"""
