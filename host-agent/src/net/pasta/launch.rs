//! The process that becomes pasta: it says who it is before it is that.

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

use super::record::Record;

/// The word after the program's name that makes it run [`launch`].
pub const VERB: &str = "pasta";
/// Where pasta's own programs are found; it needs nothing else of the environment.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Becomes `argv`, which is pasta, after its record is written. `parent` is the agent: if that has ended meanwhile, nobody
/// asks for pasta any more, and the next agent may have looked for a record already.
///
/// # Errors
/// When it does not become pasta; then no record of it is left.
pub fn launch(
    record: &Path,
    parent: u32,
    attachment: String,
    argv: &[OsString],
) -> anyhow::Result<Infallible> {
    rustix::process::setsid().context("cannot leave the agent's session")?;
    let (program, words) = argv.split_first().context("no program")?;
    Record::of_ourselves(attachment)
        .and_then(|ours| ours.write(record))
        .context("cannot write its record")?;
    let failure = match std::os::unix::process::parent_id() == parent {
        true => {
            let mut command = Command::new(program);
            command.args(words).env_clear().env("PATH", PATH).current_dir("/");
            anyhow::Error::new(command.exec()).context(format!("cannot run {}", program.display()))
        }
        false => anyhow::anyhow!("the host agent has ended"),
    };
    let _ = std::fs::remove_file(record); // ours: nobody else's is put there while we live
    bail!(failure)
}
