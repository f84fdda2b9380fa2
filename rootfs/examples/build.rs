//! A real build: `build <cache> <init> <agent> [--miniflux] [--locked] [--update] [--arm64]`.

use std::{path::Path, process::ExitCode, time::Instant};

use sovereign_rootfs::{Arch, Build, build};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let paths: Vec<&Path> = arguments
        .iter()
        .filter(|argument| !argument.starts_with("--"))
        .map(Path::new)
        .collect();
    let [cache, init, agent] = paths.as_slice() else {
        eprintln!("usage: build <cache> <init> <agent> [--miniflux] [--locked] [--update] [--arm64]");
        return ExitCode::from(2);
    };
    let request = Build {
        cache,
        mirror: None,
        snapshot: None,
        arch: if has("--arm64") { Arch::Arm64 } else { Arch::Amd64 },
        recipe: if has("--miniflux") {
            "miniflux"
        } else {
            "postgresql-17"
        },
        locked: has("--locked"),
        update: has("--update"),
        init,
        agent,
        lock: None,
    };
    let start = Instant::now();
    let result = build(&request, &mut |step| {
        eprintln!("{:>7.3} s {step:?}", start.elapsed().as_secs_f64())
    });
    eprintln!("{:>7.3} s end", start.elapsed().as_secs_f64());
    match result {
        Ok(artifacts) => {
            println!("{artifacts:#?}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let mut cause: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = cause {
                eprintln!("{error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}
