//! Samples of one figure: percentiles of many, medians of few, ratios of pairs. Pure.

use std::time::Duration;

/// Measured values of one kind, in one unit.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// Adds a time, in microseconds.
    pub(crate) fn time(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1e6);
    }

    /// Adds a value.
    pub(crate) fn value(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds everything of another.
    pub(crate) fn extend(&mut self, other: &Self) {
        self.0.extend(&other.0);
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// The value that a share of them does not exceed (nearest rank); NaN when there is none.
    pub(crate) fn percentile(&self, percent: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss
        )]
        let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    /// The middle one.
    pub(crate) fn median(&self) -> f64 {
        self.percentile(50.0)
    }
}

/// The median of the ratios of pairs: what one round slows down it slows down for both.
pub(crate) fn paired(ours: &[f64], theirs: &[f64]) -> f64 {
    let ratios = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
    Samples(ratios).median()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        Samples(values.to_vec())
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(samples(&hundred).percentile(50.0), 50.0);
        assert_eq!(samples(&hundred).percentile(99.0), 99.0);
        assert_eq!(samples(&[3.0, 1.0, 2.0]).median(), 2.0);
        assert!(samples(&[]).median().is_nan());
    }

    #[test]
    fn a_slow_round_does_not_move_the_ratio_of_pairs() {
        assert_eq!(paired(&[1.0, 10.0, 1.0], &[2.0, 20.0, 2.0]), 0.5);
    }
}
