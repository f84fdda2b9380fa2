//! What was measured: rows for people, the same as JSON for programs.

use std::fmt::Write as _;

use serde::Serialize;

use crate::samples::Samples;

/// One figure, beside its peer's if there is one.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// What was measured.
    pub(crate) what: String,
    /// Ours.
    pub(crate) ours: f64,
    /// The 99th percentile of ours, where there are enough samples.
    pub(crate) p99: Option<f64>,
    /// The unit of both.
    pub(crate) unit: &'static str,
    /// The peer.
    pub(crate) peer: Option<Peer>,
    /// What the ratio (or, without a peer, the value) should be.
    pub(crate) target: Option<Target>,
    /// Samples of ours.
    pub(crate) samples: usize,
    /// How it was measured, in words.
    pub(crate) how: String,
}

/// A peer measured in the same run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Peer {
    /// Its name and version.
    pub(crate) name: String,
    /// Its figure.
    pub(crate) value: f64,
    /// Its 99th percentile.
    pub(crate) p99: Option<f64>,
    /// Ours divided by its: the median over the pairs.
    pub(crate) ratio: f64,
}

/// A budget.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// At most this ratio or, without a peer, this value.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
}

/// What this machine could not measure.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Skipped {
    /// Which part.
    pub(crate) what: String,
    /// Why.
    pub(crate) reason: String,
}

/// Everything of one run.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    /// Figures in the order in which they were measured.
    pub(crate) rows: Vec<Row>,
    /// What was not measured.
    pub(crate) skipped: Vec<Skipped>,
}

impl Row {
    /// A figure from samples: the median, and the 99th percentile of a hundred or more.
    pub(crate) fn of(what: impl Into<String>, unit: &'static str, samples: &Samples, how: &str) -> Self {
        Self {
            what: what.into(),
            ours: samples.median(),
            p99: p99(samples),
            unit,
            peer: None,
            target: None,
            samples: samples.count(),
            how: how.to_owned(),
        }
    }

    /// Sets a peer's samples beside it; the ratio is that of the pairs.
    pub(crate) fn beside(mut self, name: impl Into<String>, samples: &Samples, ratio: f64) -> Self {
        self.peer = Some(Peer {
            name: name.into(),
            value: samples.median(),
            p99: p99(samples),
            ratio,
        });
        self
    }

    /// Sets the budget.
    pub(crate) fn target(mut self, target: Target) -> Self {
        self.target = Some(target);
        self
    }

    /// Whether the budget is kept; `None` without one.
    pub(crate) fn met(&self) -> Option<bool> {
        let value = self.peer.as_ref().map_or(self.ours, |peer| peer.ratio);
        self.target.map(|target| match target {
            Target::AtMost(limit) => value <= limit,
            Target::AtLeast(limit) => value >= limit,
        })
    }
}

fn p99(samples: &Samples) -> Option<f64> {
    (samples.count() >= 100).then(|| samples.percentile(99.0))
}

impl Report {
    /// Adds what a part measured, or says aloud that it could not.
    pub(crate) fn part(&mut self, what: &str, outcome: anyhow::Result<Vec<Row>>) {
        match outcome {
            Ok(rows) => {
                for row in rows {
                    eprintln!("{}", line(&row));
                    self.rows.push(row);
                }
            }
            Err(error) => self.skip(what, format!("{error:#}")),
        }
    }

    /// Says aloud that something is not measured.
    pub(crate) fn skip(&mut self, what: &str, reason: String) {
        eprintln!("SKIPPED: {what}: {reason}");
        self.skipped.push(Skipped {
            what: what.to_owned(),
            reason,
        });
    }

    /// The table, a line a figure.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "{:<58} {:>20} {:>20} {:>8}  {:<16} {:>6}  peer\n",
            "what", "ours (p99)", "peer (p99)", "ratio", "target", "n"
        );
        for row in &self.rows {
            let _ = writeln!(text, "{}", line(row)); // writing to a String cannot fail
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "SKIPPED: {}: {}", skipped.what, skipped.reason);
        }
        text
    }
}

fn line(row: &Row) -> String {
    let ours = figure(row.ours, row.p99, row.unit);
    let (peer, ratio, name) = match &row.peer {
        Some(peer) => (
            figure(peer.value, peer.p99, row.unit),
            format!("{:.2}", peer.ratio),
            peer.name.as_str(),
        ),
        None => (String::new(), String::new(), ""),
    };
    let limit = match row.target {
        Some(Target::AtMost(limit)) => format!("<= {limit}"),
        Some(Target::AtLeast(limit)) => format!(">= {limit}"),
        None => String::new(),
    };
    let verdict = match row.met() {
        Some(true) => " met",
        Some(false) => " MISSED",
        None => "",
    };
    format!(
        "{:<58} {ours:>20} {peer:>20} {ratio:>8}  {:<16} {:>6}  {name}",
        row.what,
        format!("{limit}{verdict}"),
        row.samples
    )
    .trim_end()
    .to_owned()
}

fn figure(value: f64, p99: Option<f64>, unit: &str) -> String {
    match p99 {
        Some(p99) => format!("{} ({}) {unit}", short(value), short(p99)),
        None => format!("{} {unit}", short(value)),
    }
}

/// Three significant digits are more than a shared machine can give.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ratio: f64, target: Target) -> Row {
        let mut ours = Samples::default();
        ours.value(1.0);
        Row::of("x", "us", &ours, "")
            .beside("peer", &ours, ratio)
            .target(target)
    }

    #[test]
    fn a_budget_is_of_the_ratio_where_there_is_a_peer() {
        assert_eq!(row(0.5, Target::AtMost(0.55)).met(), Some(true));
        assert_eq!(row(0.6, Target::AtMost(0.55)).met(), Some(false));
        assert_eq!(row(3.9, Target::AtLeast(4.0)).met(), Some(false));
        let mut alone = Samples::default();
        alone.value(31.0);
        let alone = Row::of("status", "ms", &alone, "").target(Target::AtMost(30.0));
        assert_eq!(alone.met(), Some(false));
    }

    #[test]
    fn what_could_not_be_measured_is_said_in_the_table() {
        let mut report = Report::default();
        report.part("vsock", Err(anyhow::anyhow!("no QEMU")));
        assert!(report.table().contains("SKIPPED: vsock: no QEMU"));
    }
}
