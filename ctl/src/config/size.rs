//! Sizes as people write them. Pure.

use super::Problem;
use super::source::Source;

/// What a size looks like.
const FORM: &str = "a number and MiB, GiB or TiB, such as \"256MiB\"";

/// The size at `path` in MiB, if there is one.
///
/// # Errors
/// When it is no size; its limits are not looked at.
pub(super) fn of(
    source: &Source<'_>,
    path: &[&str],
    text: Option<&str>,
) -> Result<Option<u32>, Box<Problem>> {
    let Some(text) = text else { return Ok(None) };
    match mebibytes(text) {
        Some(mib) => Ok(Some(mib)),
        None => Err(source
            .problem(path, "BadSize", format!("{text:?} is no size"))
            .accepts(FORM)),
    }
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
