//! Charts as SVG that takes its colours from the page around it.
//!
//! Only numbers go into a chart: names are in the page's own legend.

use std::ops::Range;

use anyhow::{Context, Result};
use plotters::coord::ranged1d::{AsRangedCoord, DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;

/// Width and height; a page scales it, and three of them stand side by side on a wide screen.
const SIZE: (u32, u32) = (440, 300);
/// Of labels; the library's unit is a little less than a pixel.
const TEXT_SIZE: u32 = 15;
/// Colours of series that a page defines as `--s0` to `--s7`.
pub(super) const PALETTE: usize = 8;

/// What is drawn with; a page's colours take their places afterwards.
const TEXT: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);

fn series_color(index: usize) -> RGBColor {
    RGBColor(3, 3, 16 + (index % PALETTE) as u8)
}

/// The page's colours in the place of those that were drawn with.
fn themed(svg: &str) -> String {
    let mut svg = svg.replace("\"#010101\"", "\"currentColor\"");
    svg = svg.replace("\"#020202\"", "\"var(--grid)\"");
    for index in 0..PALETTE {
        let RGBColor(r, g, b) = series_color(index);
        svg = svg.replace(&format!("\"#{r:02X}{g:02X}{b:02X}\""), &format!("\"var(--s{index})\""));
    }
    svg
}

/// An axis: its name, its ends, and whether a step is a factor.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    name: &'static str,
    range: Range<f64>,
    is_log: bool,
}

impl Axis {
    /// From 0 to the largest of the values.
    pub(super) fn linear(name: &'static str, values: impl Iterator<Item = f64>) -> Self {
        let max = values.filter(|value| value.is_finite()).fold(0.0, f64::max);
        let max = if max > 0.0 { 1.04 * max } else { 1.0 };
        Self { name, range: 0.0..max, is_log: false }
    }

    /// From 0 or less, where values are.
    fn with_room_below(mut self, values: impl Iterator<Item = f64>) -> Self {
        self.range.start = values.filter(|value| value.is_finite()).fold(0.0, f64::min);
        self
    }

    /// Around the values, all of which are above 0.
    pub(super) fn log(name: &'static str, values: impl Iterator<Item = f64> + Clone) -> Self {
        let positive = values.filter(|value| value.is_finite() && *value > 0.0);
        let min = positive.clone().fold(f64::INFINITY, f64::min);
        let max = positive.fold(0.0, f64::max);
        if max <= 0.0 {
            return Self { name, range: -1.0..1.0, is_log: true };
        }
        let (min, max) = (min.log10(), max.log10());
        let room = ((max - min) * 0.03).max(0.08);
        Self { name, range: min - room..max + room, is_log: true }
    }

    /// From 0, or by factors if the values differ by so many.
    pub(super) fn fitting(name: &'static str, values: impl Iterator<Item = f64> + Clone) -> Self {
        const WIDE: f64 = 12.0;
        let min = values.clone().fold(f64::INFINITY, f64::min);
        let max = values.clone().fold(0.0, f64::max);
        if min > 0.0 && max > WIDE * min {
            Self::log(name, values)
        } else {
            Self::linear(name, values)
        }
    }

    fn at(&self, value: f64) -> f64 {
        match self.is_log {
            true => value.max(f64::MIN_POSITIVE).log10().clamp(self.range.start, self.range.end),
            false => value.clamp(self.range.start, self.range.end),
        }
    }

    fn label(&self, at: f64) -> String {
        let value = if self.is_log { 10f64.powf(at) } else { at };
        let digits = match value.abs() {
            value if value < 1e-9 => 0,
            value => (1.0 - value.log10()).ceil().clamp(0.0, 6.0) as usize,
        };
        let text = format!("{value:.digits$}");
        match text.contains('.') {
            true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
            false => text,
        }
    }

    /// Where its lines are.
    fn marks(&self, most: usize) -> Vec<f64> {
        if !self.is_log {
            let inner: plotters::coord::types::RangedCoordf64 = self.range.clone().into();
            return inner.key_points(most);
        }
        let decades = self.range.start.floor() as i32..=self.range.end.ceil() as i32;
        let of = |steps: &[f64]| -> Vec<f64> {
            let all =
                decades.clone().flat_map(|e| steps.iter().map(move |s| f64::from(e) + s.log10()));
            all.filter(|at| self.range.contains(at)).collect()
        };
        let choices = [&[1.0, 2.0, 3.0, 4.0, 6.0, 8.0][..], &[1.0, 2.0, 5.0], &[1.0, 3.0], &[1.0]];
        let fitting = choices.into_iter().map(of).find(|marks| marks.len() <= most);
        fitting.unwrap_or_else(|| of(&[1.0]).into_iter().step_by(2).collect())
    }
}

/// An axis as the library takes it.
#[derive(Clone)]
pub(super) struct Scale(Axis);

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let inner: plotters::coord::types::RangedCoordf64 = self.0.range.clone().into();
        inner.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        self.0.marks(hint.max_num_points())
    }

    fn range(&self) -> Range<f64> {
        self.0.range.clone()
    }
}

impl AsRangedCoord for Axis {
    type CoordDescType = Scale;
    type Value = f64;
}

impl From<Axis> for Scale {
    fn from(axis: Axis) -> Self {
        Self(axis)
    }
}

/// A line of a chart.
pub(super) struct Line {
    /// Which of the page's colours.
    pub(super) color: usize,
    pub(super) points: Vec<(f64, f64)>,
    /// x, and from which y to which.
    pub(super) bars: Vec<(f64, f64, f64)>,
}

/// A stretch of x in a colour of the page.
pub(super) struct Band {
    pub(super) color: usize,
    pub(super) from: f64,
    pub(super) to: f64,
}

/// Lines, over bands.
pub(super) fn lines((x, y): (Axis, Axis), bands: &[Band], all: &[Line]) -> Result<String> {
    let mut svg = String::new();
    draw_lines(&mut svg, (&x, &y), bands, all).context("drawing a chart")?;
    Ok(themed(&svg))
}

fn draw_lines(
    svg: &mut String,
    (x, y): (&Axis, &Axis),
    bands: &[Band],
    all: &[Line],
) -> Result<()> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .margin(8)
        .x_label_area_size(44)
        .y_label_area_size(62)
        .build_cartesian_2d(x.clone(), y.clone())?;
    let (bottom, top) = (y.range.start, y.range.end);
    chart.draw_series(bands.iter().map(|band| {
        let corners = [(x.at(band.from), bottom), (x.at(band.to), top)];
        Rectangle::new(corners, series_color(band.color).mix(0.14).filled())
    }))?;
    let text = ("sans-serif", TEXT_SIZE).into_font().color(&TEXT);
    chart
        .configure_mesh()
        .x_labels(7)
        .y_labels(7)
        .x_label_formatter(&|at| x.label(*at))
        .y_label_formatter(&|at| y.label(*at))
        .x_desc(x.name)
        .y_desc(y.name)
        .label_style(text.clone())
        .axis_desc_style(text)
        .axis_style(GRID)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()?;
    for line in all {
        let color = series_color(line.color);
        let points = line.points.iter().map(|&(a, b)| (x.at(a), y.at(b)));
        chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
        for &(at, from, to) in &line.bars {
            let ends = vec![(x.at(at), y.at(from)), (x.at(at), y.at(to))];
            chart.draw_series([PathElement::new(ends, color.mix(0.5).stroke_width(4))])?;
            let middle = line.points.iter().find(|(a, _)| *a == at);
            chart.draw_series(
                middle.map(|&(a, b)| Circle::new((x.at(a), y.at(b)), 3, color.filled())),
            )?;
        }
    }
    root.present()?;
    Ok(())
}

/// A bar: its colour, all of it, and the solid part.
pub(super) struct Bar {
    pub(super) color: usize,
    pub(super) all: f64,
    pub(super) part: Option<f64>,
    /// Least and largest of all.
    pub(super) ends: (f64, f64),
}

/// Groups of bars from 0 up, with names below.
pub(super) fn bars(name: &'static str, groups: &[(&'static str, Vec<Bar>)]) -> Result<String> {
    let mut svg = String::new();
    draw_bars(&mut svg, name, groups).context("drawing a chart")?;
    Ok(themed(&svg))
}

fn draw_bars(
    svg: &mut String,
    name: &'static str,
    groups: &[(&'static str, Vec<Bar>)],
) -> Result<()> {
    let values = || groups.iter().flat_map(|(_, bars)| bars);
    // An idle baseline that was noisy may leave less than nothing.
    let y = Axis::linear(name, values().map(|bar| bar.ends.1))
        .with_room_below(values().filter_map(|bar| bar.part));
    let x = Axis { name: "", range: 0.0..groups.len() as f64, is_log: false };
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .margin(8)
        .x_label_area_size(44)
        .y_label_area_size(62)
        .build_cartesian_2d(x.clone(), y.clone())?;
    let text = ("sans-serif", TEXT_SIZE).into_font().color(&TEXT);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .y_labels(7)
        .y_label_formatter(&|at| y.label(*at))
        .y_desc(y.name)
        .label_style(text.clone())
        .axis_desc_style(text.clone())
        .axis_style(GRID)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (at, (label, bars)) in groups.iter().enumerate() {
        let width = 0.8 / bars.len().max(1) as f64;
        for (index, bar) in bars.iter().enumerate() {
            let left = at as f64 + 0.1 + index as f64 * width;
            let (from, to) = (left + 0.08 * width, left + 0.92 * width);
            let color = series_color(bar.color);
            chart.draw_series([Rectangle::new(
                [(from, 0.0), (to, bar.all)],
                color.mix(0.35).filled(),
            )])?;
            if let Some(part) = bar.part {
                chart.draw_series([Rectangle::new([(from, 0.0), (to, part)], color.filled())])?;
            }
            let middle = f64::midpoint(from, to);
            let ends = vec![(middle, bar.ends.0), (middle, bar.ends.1)];
            chart.draw_series([PathElement::new(ends, TEXT.stroke_width(1))])?;
        }
        let (area, centre) = (chart.plotting_area().get_pixel_range(), at as f64 + 0.5);
        let width = f64::from(area.0.end - area.0.start) / groups.len() as f64;
        let place = (area.0.start + (centre * width) as i32, area.1.end + 10);
        let style = text.clone().pos(plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Center,
            plotters::style::text_anchor::VPos::Top,
        ));
        root.draw_text(label, &style, place)?;
    }
    root.present()?;
    Ok(())
}
