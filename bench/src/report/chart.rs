//! Curves as SVG.

use plotters::prelude::*;

use crate::Outcome;

/// A named line.
pub struct Series {
    /// In the legend.
    pub name: String,
    /// X and y, both above zero.
    pub points: Vec<(f64, f64)>,
}

const COLOURS: [RGBColor; 6] = [
    RGBColor(0x00, 0x5f, 0xb8),
    RGBColor(0x5a, 0xa9, 0xe6),
    RGBColor(0xc2, 0x41, 0x0c),
    RGBColor(0xf5, 0x9e, 0x42),
    RGBColor(0x4d, 0x7c, 0x0f),
    RGBColor(0x7e, 0x22, 0xce),
];

fn range(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (low, high) = values.fold((f64::MAX, 0.0_f64), |(l, h), v| (l.min(v), h.max(v)));
    low * 0.8..high * 1.3
}

/// How the x axis is written.
#[derive(Clone, Copy)]
pub enum XAxis {
    /// x is 1 / (1 - quantile).
    Percentile,
    /// x is a number.
    Number,
}

/// Lines on two logarithmic axes. Nothing to draw gives an empty text.
pub fn lines(title: &str, x_name: &str, y_name: &str, axis: XAxis, series: &[Series]) -> Outcome<String> {
    let points = || series.iter().flat_map(|s| &s.points);
    if points().next().is_none() {
        return Ok(String::new());
    }
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (900, 460)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(78)
            .build_cartesian_2d(
                range(points().map(|p| p.0)).log_scale(),
                range(points().map(|p| p.1)).log_scale(),
            )?;
        chart
            .configure_mesh()
            .x_desc(x_name)
            .y_desc(y_name)
            .x_label_formatter(&|x| match axis {
                XAxis::Percentile => {
                    let percent = 100.0 * (1.0 - 1.0 / x);
                    format!("{:.*}%", (x.log10() - 2.0).round().max(0.0) as usize, percent)
                }
                XAxis::Number => format!("{x:.0}"),
            })
            .y_label_formatter(&|y| format!("{y:.0}"))
            .light_line_style(RGBColor(0xf0, 0xf0, 0xf0))
            .draw()?;
        for (n, s) in series.iter().enumerate() {
            let colour = COLOURS[n % COLOURS.len()];
            chart
                .draw_series(LineSeries::new(s.points.iter().copied(), colour.stroke_width(2)))?
                .label(&s.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.9))
            .border_style(RGBColor(0xcc, 0xcc, 0xcc))
            .draw()?;
        root.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_drawn() {
        let series = [Series {
            name: "a & b".into(),
            points: vec![(1.0, 100.0), (10.0, 300.0), (1000.0, 9000.0)],
        }];
        let svg = lines("title", "x", "y", XAxis::Percentile, &series).expect("it draws");
        assert!(
            svg.starts_with("<svg") && svg.contains("polyline") && svg.contains("a &amp; b"),
            "{svg}"
        );
        assert_eq!(lines("t", "x", "y", XAxis::Number, &[]).expect("nothing"), "");
    }
}
