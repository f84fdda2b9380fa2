//! `sovereign-guest enter CGROUP USER -- PROGRAM ARGS`: joins a cgroup, drops to a user, becomes the program.
//!
//! A program of its own between fork and exec, so that no code of ours runs in a forked child.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::unistd::{Gid, Uid, setgid, setgroups, setsid, setuid};

use crate::{places, users};

/// The word that selects this mode.
pub const VERB: &str = "enter";

/// The arguments that make this program become `program` as `user` in `cgroup`.
#[must_use]
pub fn arguments(cgroup: &Path, user: &str, program: &Path, args: &[OsString]) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec![
        VERB.into(),
        cgroup.into(),
        user.into(),
        "--".into(),
        program.into(),
    ];
    all.extend_from_slice(args);
    all
}

/// Becomes the program; returns only on failure.
#[must_use]
pub fn enter(arguments: &[OsString]) -> io::Error {
    match prepare(arguments) {
        Ok(mut command) => command.exec(),
        Err(error) => error,
    }
}

fn prepare(arguments: &[OsString]) -> io::Result<Command> {
    let [cgroup, user, dashes, program, args @ ..] = arguments else {
        return Err(usage());
    };
    let user = user.to_str().filter(|_| dashes == "--").ok_or_else(usage)?;
    let user = users::lookup(user)?;
    std::fs::write(Path::new(cgroup).join("cgroup.procs"), "0")?;
    let _ = setsid(); // EPERM when it already leads a session
    let gid = Gid::from_raw(user.gid);
    setgroups(&[gid])?;
    setgid(gid)?;
    setuid(Uid::from_raw(user.uid))?;
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .env("PATH", places::PATH)
        .env("LANG", "C.UTF-8");
    command
        .env("HOME", &user.home)
        .env("USER", &user.name)
        .current_dir("/");
    Ok(command)
}

fn usage() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "usage: enter CGROUP USER -- PROGRAM [ARGUMENT]...",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_side_writes_the_other_side_understands() {
        let args = arguments(
            Path::new("/nowhere"),
            "root",
            Path::new("/bin/true"),
            &["-x".into()],
        );
        assert_eq!(args[0], VERB);
        // Understood up to the cgroup, which is not there.
        assert_eq!(prepare(&args[1..]).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(
            prepare(&args[2..]).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
