//! A place of its own for each run of the binary.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// A directory that holds everything the binary may write.
pub(crate) struct Home(tempfile::TempDir);

impl Home {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        let mut argv = vec![env!("CARGO_BIN_EXE_sovereign").into()];
        argv.extend(args.iter().map(Into::into));
        self.command(&argv).output().unwrap()
    }

    /// `sovereign` with what has to lie beside it; `before` runs it, such as strace.
    pub(crate) fn installed(&self, before: &[&str], args: &[&str]) -> Output {
        let bin = self.path().join("bin");
        if !bin.exists() {
            std::fs::create_dir(&bin).unwrap();
            let own = bin.join("sovereign");
            std::fs::hard_link(env!("CARGO_BIN_EXE_sovereign"), &own)
                .or_else(|_| std::fs::copy(env!("CARGO_BIN_EXE_sovereign"), &own).map(drop))
                .unwrap();
            for name in ["sovereign-host", "sovereign-init", "sovereign-guest"] {
                std::fs::write(bin.join(name), name).unwrap();
            }
        }
        let mut argv: Vec<std::ffi::OsString> = before.iter().map(Into::into).collect();
        argv.push(bin.join("sovereign").into());
        argv.extend(args.iter().map(Into::into));
        self.command(&argv).output().unwrap()
    }

    fn command(&self, argv: &[std::ffi::OsString]) -> Command {
        let mut command = Command::new(&argv[0]);
        command
            .args(&argv[1..])
            .current_dir(self.path())
            .env_clear()
            .stdin(std::process::Stdio::null());
        for (name, below) in [
            ("HOME", "home"),
            ("XDG_CACHE_HOME", "cache"),
            ("SOVEREIGN_STATE_DIR", "state"),
            ("SOVEREIGN_RUN_DIR", "run"),
        ] {
            command.env(name, self.path().join(below));
        }
        command
    }

    pub(crate) fn state(&self, below: &str) -> std::path::PathBuf {
        self.path().join("state/default").join(below)
    }

    pub(crate) fn write_state(&self, below: &str, text: &str) {
        let path = self.state(below);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
}

pub(crate) fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The one object on stdout, with exactly the promised fields.
pub(crate) fn failure(output: &Output) -> Value {
    let text = stdout(output);
    assert_eq!(text.lines().count(), 1, "{text}");
    let object: Value = serde_json::from_str(&text).unwrap();
    let keys: Vec<&String> = object.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["evidence", "layer", "next", "ok", "reason"]);
    assert_eq!(object["ok"], false);
    assert!(!object["next"].as_str().unwrap().is_empty());
    object
}
