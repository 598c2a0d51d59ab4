use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use super::{MergeReport, ModuleMergeReport};

/// Least width of a page; many blocks or adapters make it wider.
const WIDTH: usize = 960;
const MARGIN: usize = 24;
/// Side of a cell of a map with its gap.
const CELL: usize = 16;
const MATRIX_CELL: (usize, usize) = (46, 26);
/// Least width of a cell of a matrix with its gap.
const NARROW_CELL: usize = 14;
const MATRIX_LABELS: usize = 150;
const MAP_LABELS: usize = 92;
/// Classes of a share from 0 to 1, and of what is more.
const STEPS: usize = 10;

const STYLE: &str = "
svg{--surface:#fcfcfb;--ink:#1c1b1a;--quiet:#6b6963;--line:#d3d1ca;--c0:#eef3f9;--c1:#dbe7f5;--c2:#c3d8f0;--c3:#a6c5ea;--c4:#85afe2;--c5:#6297d6;--c6:#417ec7;--c7:#2a66b0;--c8:#1a4f93;--c9:#0f3970;--low:#1c1b1a;--high:#ffffff}
@media(prefers-color-scheme:dark){svg{--surface:#1a1a19;--ink:#f0efec;--quiet:#a3a19a;--line:#4a4843;--c0:#222b36;--c1:#23364b;--c2:#264462;--c3:#2b547c;--c4:#326698;--c5:#3f7ab5;--c6:#5893d0;--c7:#7aace2;--c8:#a2c6ef;--c9:#cde1f8;--low:#f0efec;--high:#14130f}}
text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:var(--ink)}
.title{font-size:18px;font-weight:600}.head{font-size:13px;font-weight:600}.quiet{fill:var(--quiet)}.small{font-size:10px}
.surface{fill:var(--surface)}.none{fill:none;stroke:var(--line)}
.c0{fill:var(--c0)}.c1{fill:var(--c1)}.c2{fill:var(--c2)}.c3{fill:var(--c3)}.c4{fill:var(--c4)}.c5{fill:var(--c5)}.c6{fill:var(--c6)}.c7{fill:var(--c7)}.c8{fill:var(--c8)}.c9{fill:var(--c9)}
.low{fill:var(--low)}.high{fill:var(--high)}.right{text-anchor:end}.middle{text-anchor:middle}";

/// The report as a picture: how far each module is from the exact sum, how much of each adapter is left where, and which
/// directions adapters have in common. An SVG that stands alone and follows the colour scheme of who looks at it;
/// figures are in its tooltips.
pub(crate) fn merge_picture(report: &MergeReport) -> String {
    let map = BlockMap::new(&report.modules);
    let summary = &report.summary;
    let count = summary.adapters.len();
    let content = map.width().max(if count > 1 { MATRIX_LABELS + count * NARROW_CELL } else { 0 });
    let width = WIDTH.max(content + 2 * MARGIN);
    let mut page = Page { body: String::new(), width, y: MARGIN + 16 };
    let adapters = if count == 1 { "1 adapter".to_string() } else { format!("{count} adapters") };
    page.text(MARGIN, "title", &format!("{adapters}, merged by {} at rank {}", report.recipe.method, summary.rank));
    page.y += 20;
    let mut line = format!("{} modules", summary.modules);
    if let Some(error) = summary.error {
        let _ = write!(line, " · distance from the exact sum {}", percent(error));
    }
    if let Some(error) = summary.weighted_error {
        let _ = write!(line, " · of the outputs {}", percent(error));
    }
    page.text(MARGIN, "quiet", &line);
    // What is said about the sum and its adapters is about their merge, before both are cut.
    let cut = report.recipe.total_rank.zip(summary.joined);
    let mut stage = String::new();
    if let Some((rank, joined)) = cut {
        stage = format!(", before the cut to rank {rank}");
        let mut line =
            format!("cut with the compensation to rank {rank} · distance from both {}", percent(joined.error));
        if let Some(error) = joined.weighted_error {
            let _ = write!(line, " · of the outputs {}", percent(error));
        }
        page.y += 16;
        page.text(MARGIN, "quiet", &line);
    }
    page.y += 18;
    page.legend();

    let mut panels = Vec::new();
    let of_module = |value: &dyn Fn(&ModuleMergeReport) -> Option<f64>| -> Vec<(usize, f64, f64)> {
        (report.modules.iter().enumerate())
            .filter_map(|(index, module)| Some((index, value(module)?, module.kept.as_ref()?.sum_norm.powi(2))))
            .collect()
    };
    panels.push(Panel {
        title: "distance from the exact sum".into(),
        note: summary.error.map_or(String::new(), percent),
        cells: map.cells(&of_module(&|module| Some(module.kept.as_ref()?.error))),
    });
    if let Some(error) = summary.weighted_error {
        panels.push(Panel {
            title: "distance of the outputs".into(),
            note: percent(error),
            cells: map.cells(&of_module(&|module| module.kept.as_ref()?.weighted_error)),
        });
    }
    page.section(&format!("Distance from the exact weighted sum, by block and Linear{stage}"));
    page.panels(&map, &panels);
    if let Some((rank, joined)) = cut {
        let of_join =
            |module: &ModuleMergeReport| module.joined.as_ref().map(|join| (join.error, join.sum_norm.powi(2)));
        let values: Vec<(usize, f64, f64)> = (report.modules.iter().enumerate())
            .filter_map(|(index, module)| of_join(module).map(|(error, energy)| (index, error, energy)))
            .collect();
        page.section(&format!("What the cut with the compensation to rank {rank} costs, by block and Linear"));
        let title = "distance from both".to_string();
        page.panels(&map, &[Panel { title, note: percent(joined.error), cells: map.cells(&values) }]);
    }
    let names = short_names(summary.adapters.iter().map(|adapter| adapter.path.as_path()));
    let panels: Vec<Panel> = (summary.adapters.iter().zip(&names).enumerate())
        .map(|(index, (adapter, name))| {
            let values: Vec<(usize, f64, f64)> = (report.modules.iter().enumerate())
                .filter_map(|(at, module)| {
                    let place = module.adapters.iter().position(|&source| source == index)?;
                    let share = module.kept.as_ref()?.sources[place];
                    Some((at, share.retained, share.norm.powi(2)))
                })
                .collect();
            let retained = adapter.retained.map_or(String::new(), |share| format!("{} retained", percent(share)));
            let multiple = adapter.multiple.map_or(String::new(), |multiple| format!(", {multiple:.2}× in the result"));
            Panel {
                title: name.clone(),
                note: format!("{retained}{multiple}, weight {}", adapter.weight),
                cells: map.cells(&values),
            }
        })
        .collect();
    page.section(&format!("Share of each adapter that the result can express, by block and Linear{stage}"));
    page.panels(&map, &panels);
    if count > 1 {
        page.section("Directions in common, mean over the modules of both: outputs above the diagonal, inputs below");
        page.matrix(&names, &overlaps(report));
    }
    let height = page.y + MARGIN;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         role=\"img\" aria-label=\"What a merge of {adapters} kept\">\n<style>{STYLE}</style>\n\
         <rect class=\"surface\" width=\"{width}\" height=\"{height}\"/>\n{}</svg>\n",
        page.body
    )
}

/// Where modules stand in a map: their block across, the last part of their path down.
struct BlockMap {
    /// Numbers of the blocks; `None` for modules outside of blocks.
    blocks: Vec<Option<usize>>,
    kinds: Vec<String>,
    /// Of each module.
    places: Vec<(usize, usize)>,
    occupied: BTreeSet<(usize, usize)>,
}

impl BlockMap {
    fn new(modules: &[ModuleMergeReport]) -> Self {
        let found: Vec<(Option<usize>, String)> = modules.iter().map(|module| block_and_kind(&module.name)).collect();
        let mut blocks: Vec<Option<usize>> = found.iter().map(|(block, _)| *block).collect();
        blocks.sort_by_key(|block| block.map_or(usize::MAX, |number| number));
        blocks.dedup();
        let mut kinds: Vec<String> = Vec::new();
        for (_, kind) in &found {
            if !kinds.contains(kind) {
                kinds.push(kind.clone());
            }
        }
        let position = |(block, kind): &(Option<usize>, String)| {
            let across = blocks.iter().position(|other| other == block).unwrap_or(0);
            (across, kinds.iter().position(|other| other == kind).unwrap_or(0))
        };
        let places: Vec<(usize, usize)> = found.iter().map(position).collect();
        let occupied = places.iter().copied().collect();
        BlockMap { blocks, kinds, places, occupied }
    }

    /// The mean of the values in each cell, by energy, from (module, value, energy).
    fn cells(&self, values: &[(usize, f64, f64)]) -> BTreeMap<(usize, usize), f64> {
        let mut sums: BTreeMap<(usize, usize), (f64, f64, f64, f64)> = BTreeMap::new();
        for &(module, value, energy) in values {
            let sum = sums.entry(self.places[module]).or_default();
            *sum = (sum.0 + value * energy, sum.1 + energy, sum.2 + value, sum.3 + 1.0);
        }
        let mean = |(weighted, energy, plain, count)| if energy > 0.0 { weighted / energy } else { plain / count };
        sums.into_iter().map(|(place, sum)| (place, mean(sum))).collect()
    }

    fn width(&self) -> usize {
        MAP_LABELS + self.blocks.len() * CELL
    }
}

/// `(Some(3), "q_proj")` for `model.layers.3.self_attn.q_proj`.
fn block_and_kind(name: &str) -> (Option<usize>, String) {
    let block = name.split('.').find_map(|part| part.parse().ok());
    (block, name.rsplit('.').next().unwrap_or(name).to_string())
}

/// A map with a heading.
struct Panel {
    title: String,
    note: String,
    cells: BTreeMap<(usize, usize), f64>,
}

/// The mean overlaps of pairs: outputs of `(i, j)` with i < j, inputs of `(j, i)`.
fn overlaps(report: &MergeReport) -> BTreeMap<(usize, usize), f64> {
    let mut sums: BTreeMap<(usize, usize), (f64, f64)> = BTreeMap::new();
    for module in &report.modules {
        for overlap in module.kept.iter().flat_map(|kept| &kept.overlaps) {
            let (first, second) = (module.adapters[overlap.first], module.adapters[overlap.second]);
            for (pair, share) in [((first, second), overlap.outputs), ((second, first), overlap.inputs)] {
                let sum = sums.entry(pair).or_default();
                *sum = (sum.0 + share, sum.1 + 1.0);
            }
        }
    }
    sums.into_iter().map(|(pair, (sum, count))| (pair, sum / count)).collect()
}

/// The last parts of the paths; with the part before where that is not unique.
fn short_names<'a>(paths: impl Iterator<Item = &'a Path> + Clone) -> Vec<String> {
    let last = |path: &Path, parts: usize| {
        let all: Vec<String> = path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        all[all.len().saturating_sub(parts)..].join("/")
    };
    let unique = |name: &str| paths.clone().filter(|path| last(path, 1) == name).count() == 1;
    let name = |path| if unique(&last(path, 1)) { last(path, 1) } else { last(path, 2) };
    paths.clone().map(name).collect()
}

/// What is drawn, and how far down the page it has come.
struct Page {
    body: String,
    width: usize,
    y: usize,
}

impl Page {
    fn put(&mut self, element: &str) {
        self.body.push_str(element);
        self.body.push('\n');
    }

    fn text_at(&mut self, (x, y): (usize, usize), class: &str, text: &str) {
        self.put(&format!("<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{}</text>", escaped(text)));
    }

    fn text(&mut self, x: usize, class: &str, text: &str) {
        self.text_at((x, self.y), class, text);
    }

    fn cell(&mut self, (x, y): (usize, usize), (width, height): (usize, usize), class: &str, tip: &str) {
        let tip = escaped(tip);
        self.put(&format!(
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"2\"><title>{tip}</title></rect>"
        ));
    }

    fn section(&mut self, title: &str) {
        self.y += 34;
        self.text(MARGIN, "head", title);
        self.y += 8;
    }

    /// What the colours mean.
    fn legend(&mut self) {
        let y = self.y + 2;
        for step in 0..STEPS {
            let tip = format!("{} to {} %", step * 10, (step + 1) * 10);
            self.cell((MARGIN + step * 22, y), (21, 10), &format!("c{step}"), &tip);
        }
        self.text_at((MARGIN, y + 24), "quiet small", "0 %");
        self.text_at((MARGIN + STEPS * 22 - 1, y + 24), "quiet small right", "100 %");
        let none = MARGIN + STEPS * 22 + 24;
        self.cell((none, y), (CELL - 3, 10), "none", "no module");
        self.text_at((none + CELL + 2, y + 10), "quiet small", "not adapted");
        self.y += 26;
    }

    fn panels(&mut self, map: &BlockMap, panels: &[Panel]) {
        let gap = 36;
        let width = map.width().max(300);
        let across = ((self.width - 2 * MARGIN + gap) / (width + gap)).max(1);
        let height = 38 + map.kinds.len() * CELL + 18;
        for row in panels.chunks(across) {
            for (place, panel) in row.iter().enumerate() {
                self.panel(map, panel, MARGIN + place * (width + gap));
            }
            self.y += height + 10;
        }
        self.y -= 10;
    }

    fn panel(&mut self, map: &BlockMap, panel: &Panel, x: usize) {
        let top = self.y + 32;
        self.text_at((x, top - 18), "", &shortened(&panel.title, 40));
        self.text_at((x, top - 4), "quiet small", &panel.note);
        let left = x + MAP_LABELS;
        for (down, kind) in map.kinds.iter().enumerate() {
            let y = top + 4 + down * CELL;
            self.text_at((left - 6, y + 11), "quiet small right", &shortened(kind, 15));
            for across in 0..map.blocks.len() {
                if !map.occupied.contains(&(across, down)) {
                    continue;
                }
                let block = map.blocks[across].map_or(String::new(), |number| format!("block {number}, "));
                let (class, tip) = match panel.cells.get(&(across, down)) {
                    Some(&value) => (step_class(value), format!("{block}{kind}: {}", percent(value))),
                    None => ("none".to_string(), format!("{block}{kind}: not adapted")),
                };
                self.cell((left + across * CELL, y), (CELL - 2, CELL - 2), &class, &tip);
            }
        }
        let below = top + 4 + map.kinds.len() * CELL + 11;
        let every = map.blocks.len().div_ceil(32).max(1) * if map.blocks.len() > 12 { 4 } else { 1 };
        for (across, block) in map.blocks.iter().enumerate() {
            if let Some(number) = block.filter(|number| number % every == 0) {
                self.text_at((left + across * CELL + 7, below), "quiet small middle", &number.to_string());
            }
        }
    }

    fn matrix(&mut self, names: &[String], shares: &BTreeMap<(usize, usize), f64>) {
        let (width, height) = MATRIX_CELL;
        let left = MARGIN + MATRIX_LABELS;
        let width = width.min((self.width - MARGIN - left) / names.len());
        let top = self.y + 10;
        for (i, name) in names.iter().enumerate() {
            let y = top + i * height;
            self.text_at((left - 8, y + 17), "right", &shortened(name, 22));
            for (j, other) in names.iter().enumerate() {
                let at = (left + j * width, y);
                let Some(&share) = shares.get(&(i, j)) else {
                    let tip =
                        if i == j { name.clone() } else { format!("{name} and {other} have no module in common") };
                    self.cell(at, (width - 2, height - 2), "none", &tip);
                    continue;
                };
                let what = if i < j { "outputs" } else { "inputs" };
                self.cell(
                    at,
                    (width - 2, height - 2),
                    &step_class(share),
                    &format!("{name} and {other}, {what}: {}", percent(share)),
                );
                if width >= 30 {
                    let class = if share * STEPS as f64 >= 5.0 { "high" } else { "low" };
                    let middle = (at.0 + width / 2 - 1, y + 16);
                    self.text_at(middle, &format!("small middle {class}"), &format!("{:.0} %", 100.0 * share));
                }
            }
        }
        self.y = top + names.len() * height;
    }
}

fn step_class(share: f64) -> String {
    format!("c{}", ((share * STEPS as f64) as usize).min(STEPS - 1))
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn shortened(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => format!("{}…", text.chars().take(most - 1).collect::<String>()),
        false => text.to_string(),
    }
}

fn escaped(text: &str) -> String {
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    plain.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use kintsugi_merge::{LinearMergeReport, MergeOptions, Overlap, SourceShare};

    use super::*;
    use crate::merging::JoinSummary;
    use crate::{AdapterShare, JoinReport, MergeRecipe, MergeSummary, RankPadding, WholeModuleRule};

    /// Of `adapters` that all have q_proj and v_proj in each of `blocks`, cut to a total rank.
    fn report(blocks: usize, adapters: usize) -> MergeReport {
        let pairs = (0..adapters).flat_map(|i| (i + 1..adapters).map(move |j| (i, j)));
        let kept = LinearMergeReport {
            error: 0.5,
            cosine: None,
            norm_ratio: None,
            sum_norm: 2.0,
            weighted_error: None,
            weighted_sum_norm: None,
            sources: vec![SourceShare { retained: 0.5, multiple: 1.0, norm: 1.0 }; adapters],
            overlaps: pairs.map(|(first, second)| Overlap { first, second, outputs: 0.2, inputs: 0.7 }).collect(),
        };
        let joined = JoinReport {
            compensation_rank: 8,
            merged_rank: 8,
            error: 0.25,
            sum_norm: 3.0,
            weighted_error: None,
            weighted_sum_norm: None,
        };
        let module = |block: usize, kind: &str| ModuleMergeReport {
            name: format!("model.layers.{block}.self_attn.{kind}"),
            out_features: 64,
            in_features: 64,
            adapters: (0..adapters).collect(),
            rank: 12,
            cluster_sizes: Vec::new(),
            scales: Vec::new(),
            scale: 1.0,
            kept: Some(kept.clone()),
            joined: Some(joined.clone()),
        };
        let paths: Vec<std::path::PathBuf> = (0..adapters).map(|i| format!("adapters/number-{i}").into()).collect();
        let share = |path: &std::path::PathBuf| AdapterShare {
            path: path.clone(),
            weight: 1.0,
            modules: 2 * blocks,
            fingerprint: String::new(),
            retained: Some(0.5),
            multiple: Some(1.0),
        };
        MergeReport {
            summary: MergeSummary {
                modules: 2 * blocks,
                rank: 12,
                bytes: 0,
                source_bytes: 0,
                error: Some(0.5),
                weighted_error: None,
                joined: Some(JoinSummary { error: 0.25, weighted_error: None }),
                adapters: paths.iter().map(share).collect(),
                seconds: 0.0,
                peak_memory_bytes: None,
            },
            recipe: MergeRecipe {
                weights: vec![1.0; adapters],
                adapters: paths,
                out: "out".into(),
                method: "svd".into(),
                options: MergeOptions::default(),
                factor_type: None,
                padding: RankPadding::Uniform,
                allow_different_bases: false,
                calibration: None,
                compensation: Some("eora".into()),
                total_rank: Some(12),
                modules_to_save: WholeModuleRule::Equal,
                expected: BTreeMap::new(),
            },
            modules: (0..blocks).flat_map(|block| ["q_proj", "v_proj"].map(|kind| module(block, kind))).collect(),
        }
    }

    #[test]
    fn everything_is_inside_of_the_page_and_can_be_seen() {
        let number = |element: &str, name: &str| -> usize {
            let value = element.split_once(&format!(" {name}=\"")).map_or("0", |(_, rest)| rest);
            value.split('"').next().unwrap().parse().unwrap()
        };
        for (blocks, adapters) in [(80, 2), (126, 3), (2, 1), (4, 90)] {
            let picture = merge_picture(&report(blocks, adapters));
            let [width, height] = ["width", "height"].map(|name| number(picture.lines().next().unwrap(), name));
            assert!(picture.contains(&format!("viewBox=\"0 0 {width} {height}\"")));
            let rects: Vec<&str> = picture.lines().filter(|line| line.starts_with("<rect")).collect();
            // Distances, the cut, each adapter, each pair.
            assert!(rects.len() >= (2 + adapters) * 2 * blocks + adapters * adapters);
            for rect in rects {
                let [x, y, w, h] = ["x", "y", "width", "height"].map(|name| number(rect, name));
                assert!(w >= 10 && h >= 10 && x + w <= width && y + h <= height, "{width}×{height}: {rect}");
            }
            assert!(picture.contains("before the cut to rank 12") && picture.contains("25.0 %"));
        }
    }

    #[test]
    fn modules_stand_in_their_block_and_names_in_the_page() {
        assert_eq!(block_and_kind("model.layers.12.self_attn.q_proj"), (Some(12), "q_proj".into()));
        assert_eq!(block_and_kind("lm_head"), (None, "lm_head".into()));
        assert_eq!(escaped("<a & \"b\"\n>"), "&lt;a &amp; &quot;b&quot; &gt;");
        assert_eq!(shortened("shakespeare", 6), "shake…");
        let names = short_names(["a/legal", "b/legal", "c/other"].iter().map(Path::new));
        assert_eq!(names, ["a/legal", "b/legal", "other"]);
        assert_eq!((step_class(0.0), step_class(0.99), step_class(7.0)), ("c0".into(), "c9".into(), "c9".into()));
    }
}
