//! Numbers that stand for many.

use serde::{Deserialize, Serialize};

/// Repeated measurements of one thing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// All, in the order in which they were taken.
    pub values: Vec<f64>,
}

impl Spread {
    /// Of measurements; `None` if there is none.
    pub fn of(values: Vec<f64>) -> Option<Self> {
        let sorted = sorted(&values);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let median = f64::midpoint(sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Self { median, min, max, values })
    }

    /// Whether some value of one is as large as some value of the other: then no difference is shown.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.min <= other.max && other.min <= self.max
    }
}

/// Times of single tokens, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latencies {
    /// How many tokens.
    pub count: usize,
    /// Half of the tokens took no longer.
    pub p50: f64,
    /// 95 of 100 tokens took no longer.
    pub p95: f64,
    /// What shares of 0, 1/200 … 1 of the tokens took at most: the least first, the longest last.
    pub quantiles: Vec<f64>,
}

impl Latencies {
    /// Steps of [`Latencies::quantiles`].
    pub const STEPS: usize = 200;

    /// Of times in seconds; `None` if there is none.
    pub fn of_seconds(seconds: &[f64]) -> Option<Self> {
        let sorted = sorted(seconds);
        let at = |share: f64| Some(1e3 * quantile(&sorted, share)?);
        let shares = (0..=Self::STEPS).map(|step| step as f64 / Self::STEPS as f64);
        Some(Self {
            count: seconds.len(),
            p50: at(0.5)?,
            p95: at(0.95)?,
            quantiles: shares.map(at).collect::<Option<_>>()?,
        })
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The least value that `share` of all do not exceed (nearest rank).
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_and_nothing_is_dropped() {
        let odd = Spread::of(vec![3.0, 100.0, 1.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (3.0, 1.0, 100.0));
        assert_eq!(odd.values, [3.0, 100.0, 1.0]);
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 9.0]).unwrap().median, 3.0);
        assert_eq!(Spread::of(vec![7.0]).unwrap().median, 7.0);
        assert_eq!(Spread::of(Vec::new()), None);
    }

    #[test]
    fn spreads_overlap_where_they_share_a_value() {
        let spread = |values: &[f64]| Spread::of(values.to_vec()).unwrap();
        let low = spread(&[1.0, 2.0]);
        assert!(low.overlaps(&spread(&[2.0, 3.0])) && spread(&[2.0, 3.0]).overlaps(&low));
        assert!(!low.overlaps(&spread(&[2.1, 3.0])) && !spread(&[2.1, 3.0]).overlaps(&low));
        assert!(low.overlaps(&spread(&[0.0, 9.0])) && spread(&[0.0, 9.0]).overlaps(&low));
    }

    #[test]
    fn percentiles_are_times_that_occurred() {
        let seconds: Vec<f64> = (1..=100).rev().map(|i| f64::from(i) / 1e3).collect();
        let times = Latencies::of_seconds(&seconds).unwrap();
        assert_eq!((times.count, times.p50, times.p95), (100, 50.0, 95.0));
        assert_eq!(times.quantiles.len(), Latencies::STEPS + 1);
        assert_eq!((times.quantiles[0], times.quantiles[200]), (1.0, 100.0));
        assert_eq!(Latencies::of_seconds(&[]), None);
        let one = Latencies::of_seconds(&[0.25]).unwrap();
        assert_eq!((one.p50, one.p95), (250.0, 250.0));
    }
}
