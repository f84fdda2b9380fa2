//! Values as people write them, taken by the form of their key. Pure.

use std::str::FromStr;

use super::Problem;
use super::keys::{Form, Key};
use super::source::Source;

/// The size at `path` in MiB, or the key's default; `None` when it has none.
///
/// # Errors
/// When it is no size, or out of its limits.
pub(super) fn size(
    source: &Source<'_>,
    path: &[&str],
    text: Option<&str>,
    key: &Key,
) -> Result<Option<u32>, Box<Problem>> {
    let Some(text) = text else {
        return Ok(mebibytes(key.default()));
    };
    let wrong = |reason, problem: String| source.problem(path, reason, problem).accepts(key.accepted());
    let Some(mib) = mebibytes(text) else {
        return Err(wrong("BadSize", format!("{text:?} is no size")));
    };
    match &key.form {
        Form::Size(range) if !range.contains(&mib) => {
            Err(wrong("OutOfRange", format!("{text:?} is out of the limits")))
        }
        _ => Ok(Some(mib)),
    }
}

/// The number at `path`, or the key's default; `None` when it has none.
///
/// # Errors
/// When it is out of its limits.
pub(super) fn count<T: TryFrom<u32> + FromStr>(
    source: &Source<'_>,
    path: &[&str],
    number: Option<i64>,
    key: &Key,
) -> Result<Option<T>, Box<Problem>> {
    let Some(number) = number else {
        return Ok(key.default().parse().ok());
    };
    let fits = |count: &u32| matches!(&key.form, Form::Count(range) if range.contains(count));
    let count = u32::try_from(number).ok().filter(fits);
    match count.and_then(|count| T::try_from(count).ok()) {
        Some(count) => Ok(Some(count)),
        None => Err(source
            .problem(path, "OutOfRange", format!("{number} is out of the limits"))
            .accepts(key.accepted())),
    }
}

/// The percentage at `path`.
///
/// # Errors
/// When it is none, or out of its limits.
pub(super) fn percent(
    source: &Source<'_>,
    path: &[&str],
    text: Option<&str>,
    key: &Key,
) -> Result<Option<u32>, Box<Problem>> {
    let Some(text) = text else { return Ok(None) };
    let number = text
        .strip_suffix('%')
        .and_then(|number| number.trim_end().parse().ok());
    let fits = |number: &u32| matches!(&key.form, Form::Percent(range) if range.contains(number));
    match number.filter(fits) {
        Some(percent) => Ok(Some(percent)),
        None => Err(source
            .problem(path, "OutOfRange", format!("{text:?} is no such share of a CPU"))
            .accepts(key.accepted())),
    }
}

/// The word at `path`, or the key's default.
///
/// # Errors
/// `reason`, when it is none of the key's words; `what` names what it should be.
pub(super) fn choice(
    source: &Source<'_>,
    path: &[&str],
    text: Option<&str>,
    key: &Key,
    (reason, what): (&'static str, &str),
) -> Result<&'static str, Box<Problem>> {
    let Form::Choice(words) = &key.form else {
        return Ok(key.default());
    };
    let text = text.unwrap_or(key.default());
    words.iter().copied().find(|word| *word == text).ok_or_else(|| {
        source
            .problem(path, reason, format!("there is no {what} {text:?}"))
            .near(text, words)
            .accepts(key.accepted())
    })
}

fn mebibytes(text: &str) -> Option<u32> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let factor: u32 = match text[digits..].trim_start() {
        "MiB" => 1,
        "GiB" => 1 << 10,
        "TiB" => 1 << 20,
        _ => return None,
    };
    text[..digits].parse::<u32>().ok()?.checked_mul(factor)
}
