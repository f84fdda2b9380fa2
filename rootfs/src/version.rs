//! Debian version comparison: Debian policy, section 5.6.12.

use std::cmp::Ordering;

/// Compares two Debian versions (`[epoch:]upstream[-revision]`).
#[must_use]
pub fn compare(left: &str, right: &str) -> Ordering {
    let (left_epoch, left_upstream, left_revision) = split(left);
    let (right_epoch, right_upstream, right_revision) = split(right);
    compare_part(left_epoch, right_epoch)
        .then_with(|| compare_part(left_upstream, right_upstream))
        .then_with(|| compare_part(left_revision, right_revision))
}

fn split(version: &str) -> (&str, &str, &str) {
    let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, "0"));
    (epoch, upstream, revision)
}

/// Alternates between a run of other characters (compared by [`weight`]) and a run of digits (compared as a number).
fn compare_part(left: &str, right: &str) -> Ordering {
    let (mut left, mut right) = (left.as_bytes(), right.as_bytes());
    while !left.is_empty() || !right.is_empty() {
        let (left_text, left_rest) = split_run(left, |byte| !byte.is_ascii_digit());
        let (right_text, right_rest) = split_run(right, |byte| !byte.is_ascii_digit());
        let (left_digits, left_rest) = split_run(left_rest, u8::is_ascii_digit);
        let (right_digits, right_rest) = split_run(right_rest, u8::is_ascii_digit);
        let order =
            compare_text(left_text, right_text).then_with(|| compare_digits(left_digits, right_digits));
        if order.is_ne() {
            return order;
        }
        (left, right) = (left_rest, right_rest);
    }
    Ordering::Equal
}

fn split_run(bytes: &[u8], belongs: impl Fn(&u8) -> bool) -> (&[u8], &[u8]) {
    bytes.split_at(
        bytes
            .iter()
            .position(|byte| !belongs(byte))
            .unwrap_or(bytes.len()),
    )
}

fn compare_text(left: &[u8], right: &[u8]) -> Ordering {
    let length = left.len().max(right.len());
    let weights = |bytes: &[u8]| {
        (0..length)
            .map(|at| weight(bytes.get(at).copied()))
            .collect::<Vec<_>>()
    };
    weights(left).cmp(&weights(right))
}

/// A tilde sorts before the end of the part, letters before all others.
fn weight(byte: Option<u8>) -> i16 {
    match byte {
        Some(b'~') => -1,
        None => 0,
        Some(byte) if byte.is_ascii_alphabetic() => i16::from(byte),
        Some(byte) => i16::from(byte) + 256,
    }
}

fn compare_digits(left: &[u8], right: &[u8]) -> Ordering {
    let significant = |bytes: &[u8]| {
        bytes
            .iter()
            .copied()
            .skip_while(|byte| *byte == b'0')
            .collect::<Vec<_>>()
    };
    let (left, right) = (significant(left), significant(right));
    left.len().cmp(&right.len()).then_with(|| left.cmp(&right))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_dpkg() {
        // Each line was checked with `dpkg --compare-versions`.
        let table = [
            ("1.0", "1.0", Ordering::Equal),
            ("1.0", "1.0-0", Ordering::Equal),
            ("0:1.0", "1.0", Ordering::Equal),
            ("1.00", "1.0", Ordering::Equal),
            ("1:0.1", "9.9", Ordering::Greater),
            ("2:1", "10:1", Ordering::Less),
            ("1.0~rc1", "1.0", Ordering::Less),
            ("1.0~~", "1.0~", Ordering::Less),
            ("1.0~~a", "1.0~", Ordering::Less),
            ("1.0-1~deb13u1", "1.0-1", Ordering::Less),
            ("1.0-1+b2", "1.0-1", Ordering::Greater),
            ("1.0-1+b10", "1.0-1+b9", Ordering::Greater),
            ("1.9", "1.10", Ordering::Less),
            ("1.0a", "1.0+", Ordering::Less),
            ("1.0a", "1.0", Ordering::Greater),
            ("2.41-12+deb13u4", "2.41-12+deb13u10", Ordering::Less),
            ("6.12.117-1", "6.12.107-1", Ordering::Greater),
            ("1.2-3-4", "1.2-3", Ordering::Greater),
            ("99999999999999999999999999", "1", Ordering::Greater),
        ];
        for (left, right, order) in table {
            assert_eq!(compare(left, right), order, "{left} {right}");
            assert_eq!(compare(right, left), order.reverse(), "{right} {left}");
        }
    }
}
