//! Floor 1: every corpus as it is, and seeded mutations of it, on the stable compiler.
#![allow(missing_docs)]

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};

use sovereign_fuzz::mutate::{Dice, mutated};
use sovereign_fuzz::{TARGETS, Target};

/// Mutations of each target, `FUZZ_ROUNDS` of the environment instead of it.
const ROUNDS: u64 = 10_000;
/// One target takes no longer, `FUZZ_SECONDS` instead of it.
const SECONDS: u64 = 2;
/// All of this process: a parser that takes a length for granted ends the test.
const MEMORY_BYTES: u64 = 2 << 30;
/// A corpus that a test of ctl replays: its parser is in a program.
const BESIDE: &str = "sovereign-toml";
/// One input may take so long.
const SLOW: Duration = Duration::from_secs(5);

fn number(variable: &str, default: u64) -> u64 {
    let given = std::env::var(variable).ok().and_then(|text| text.parse().ok());
    given.unwrap_or(default)
}

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let entries = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", dir.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn try_one(target: &Target, input: &[u8]) {
    let begun = Instant::now();
    let outcome = catch_unwind(|| (target.run)(input));
    let slow = begun.elapsed() > SLOW;
    if outcome.is_ok() && !slow {
        return;
    }
    let path = std::env::temp_dir().join(format!("sovereign-fuzz-{}-{}", target.name, std::process::id()));
    fs::write(&path, input).unwrap();
    let what = if slow { "is slow with" } else { "panics on" };
    panic!("{} {what} {} bytes: {}", target.name, input.len(), path.display());
}

#[test]
fn no_parser_panics_or_takes_more_than_it_may() {
    let limit = rustix::process::Rlimit {
        current: Some(MEMORY_BYTES),
        maximum: Some(MEMORY_BYTES),
    };
    rustix::process::setrlimit(rustix::process::Resource::As, limit).unwrap();
    let rounds = number("FUZZ_ROUNDS", ROUNDS);
    let limit = Duration::from_secs(number("FUZZ_SECONDS", SECONDS));
    let only = std::env::var("FUZZ_TARGET").ok();
    for target in TARGETS
        .iter()
        .filter(|target| only.as_ref().is_none_or(|only| target.name == only))
    {
        let corpus = corpus(target);
        let begun = Instant::now();
        try_one(target, &[]);
        for input in &corpus {
            try_one(target, input);
        }
        let mut dice = Dice::new(number("FUZZ_SEED", 1));
        let mut done = 0;
        while done < rounds && begun.elapsed() < limit {
            let (input, other) = (
                &corpus[dice.below(corpus.len())],
                &corpus[dice.below(corpus.len())],
            );
            try_one(target, &mutated(input, other, &mut dice));
            done += 1;
        }
        println!(
            "{:<18} {} inputs, {done} mutations, {:?}",
            target.name,
            corpus.len(),
            begun.elapsed()
        );
    }
}

#[test]
fn every_corpus_has_its_target() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for entry in fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(
            name == BESIDE || TARGETS.iter().any(|target| name == target.name),
            "{name:?}"
        );
    }
}

/// A corpus whose good inputs are refused at once tests nothing.
#[test]
fn good_seeds_are_read() {
    use sovereign_protocol::{boot::BootRecord, record::Record, spec::GuestSpec, spec::HostSpec};
    let seed =
        |path: &str| fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(path)).unwrap();
    HostSpec::parse(&seed("host-spec/full")).unwrap();
    GuestSpec::parse(&seed("guest-spec/full")).unwrap();
    BootRecord::parse(&seed("boot-record/good")).unwrap();
    serde_json::from_slice::<Record>(&seed("event-record/good")).unwrap();
    for message in ["identity", "state", "stopped", "silent", "exited"] {
        let message = seed(&format!("shim-lines/{message}"));
        serde_json::from_slice::<sovereign_host_agent::shim::contract::Message>(&message).unwrap();
    }
    for packed in ["xz", "zstd"] {
        sovereign_kernel::decompress(&seed(&format!("compressed/{packed}")), 1 << 20).unwrap();
    }
    assert!(sovereign_kernel::decompress(&seed("compressed/xz-zeros"), 1 << 20).is_err());
    for image in ["bzimage", "arm64", "plain"] {
        sovereign_kernel::vmlinux(&seed(&format!("kernel-image/{image}"))).unwrap();
    }
    for (target, name, good) in [
        ("deb", "plain", true),
        ("deb", "xz", true),
        ("deb", "size", false),
        ("tar", "gnu", true),
        ("tar", "pax", true),
        ("tar", "hostile", false),
        ("lock", "good", true),
        ("elf-needed", "library", true),
    ] {
        let read = sovereign_rootfs::fuzz::is_read(target, &seed(&format!("{target}/{name}")));
        assert_eq!(read, good, "{target}/{name}");
    }
}
