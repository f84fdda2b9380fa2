//! Where the measured programs are; `make bench` says it.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context;

/// The programs of one run and where its results go.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// The product's four binaries.
    pub(crate) product: PathBuf,
    /// The static binaries of this workspace: `empty` and `probe`.
    pub(crate) statics: PathBuf,
    /// vhost-device-vsock, where it could be installed.
    pub(crate) device: PathBuf,
    /// For results.json.
    pub(crate) out: PathBuf,
}

/// Reads `--product DIR --statics DIR --device FILE --out DIR [PART ...]`.
///
/// # Errors
/// For an option that is unknown or has no value.
pub(crate) fn arguments(mut words: impl Iterator<Item = OsString>) -> anyhow::Result<(Places, Vec<String>)> {
    let (mut places, mut parts) = (Places::default(), Vec::new());
    while let Some(word) = words.next() {
        let word = word.into_string().ok().context("an argument is not UTF-8")?;
        let place = match word.as_str() {
            "--product" => &mut places.product,
            "--statics" => &mut places.statics,
            "--device" => &mut places.device,
            "--out" => &mut places.out,
            other if other.starts_with('-') => anyhow::bail!("no option {other}"),
            _ => {
                parts.push(word);
                continue;
            }
        };
        *place = words
            .next()
            .with_context(|| format!("{word} has no value"))?
            .into();
    }
    Ok((places, parts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_parts_mix_and_nonsense_is_refused() {
        let words = |text: &str| {
            text.split(' ')
                .map(OsString::from)
                .collect::<Vec<_>>()
                .into_iter()
        };
        let (places, parts) = arguments(words("--out /o size --product /p rpc")).unwrap();
        assert_eq!((places.out, places.product), ("/o".into(), "/p".into()));
        assert_eq!(parts, ["size", "rpc"]);
        assert!(arguments(words("--out")).is_err());
        assert!(arguments(words("--nonsense x")).is_err());
    }
}
