//! `iptables-save` and `iptables-restore`: finds those that work here, reads our part of the tables, changes it.
//!
//! Decides nothing: [`sovereign_reconcile::iptables`] makes the text. Programs run in the namespace of this process,
//! one at a time for each call, with a deadline, and what they say is bounded. There are no events here: the caller
//! looks again when netlink tells of a change and at its own slow pace. A call that is dropped kills its program; a
//! table is then changed as a whole or not at all.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::Serialize;
use sovereign_reconcile::answers::MASK;
use sovereign_reconcile::iptables::{Able, Family, Observed, Restore, Table, parse};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

/// One program must end within this time.
const DEADLINE: Duration = Duration::from_secs(10);
/// For how many seconds a program waits for the lock that all legacy programs of a machine share.
const LOCK: &str = "--wait=5";
/// What `iptables-save` may say, in bytes: 100,000 rules have 10 MB.
const SAVE_BYTES: u64 = 64 << 20;
/// What is kept of a program's complaint, in bytes.
const COMPLAINT_BYTES: u64 = 4 << 10;
/// `RESOURCE_PROBLEM` (iptables, xtables.h): the lock, EAGAIN after somebody else's change, no memory.
const RESOURCE_PROBLEM: i32 = 4;
/// Pauses before a change is tried again after a resource problem.
const PAUSES: [Duration; 3] = [
    Duration::from_millis(10),
    Duration::from_millis(50),
    Duration::from_millis(250),
];
/// Where programs are beside PATH: an agent may be started with none.
const DIRECTORIES: [&str; 3] = ["/usr/sbin", "/sbin", "/system/bin"];

/// Which of the programs are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// Those without an addition: what other software on this machine uses.
    Plain,
    /// Those that write nf_tables.
    Nft,
    /// Those that write x_tables.
    Legacy,
}

impl Variant {
    /// In the order of preference: our rules belong where everybody's are.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Nft, Self::Legacy];

    fn program(self, family: Family, verb: &str) -> String {
        let family = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        match self {
            Self::Plain => format!("{family}-{verb}"),
            Self::Nft => format!("{family}-nft-{verb}"),
            Self::Legacy => format!("{family}-legacy-{verb}"),
        }
    }
}

/// The namespace whose tables are meant.
#[derive(Debug, Clone, Copy)]
pub enum Namespace<'a> {
    /// The one that this process is in.
    Own,
    /// Another one; cannot be served: no process of ours can be started in it from outside.
    Other(BorrowedFd<'a>),
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum IptablesError {
    /// For [`Namespace::Other`].
    #[error("iptables cannot be used in another namespace than the agent's own")]
    Unsupported,
    /// Neither PATH nor the usual directories have it.
    #[error("{0} is not installed")]
    Missing(String),
    /// The family was not found to work.
    #[error("{0} has no iptables here")]
    NoFamily(Family),
    /// It could not be started or talked to.
    #[error("{program} to {doing}")]
    Run {
        /// The program.
        program: PathBuf,
        /// What for.
        doing: String,
        /// The system's own.
        source: io::Error,
    },
    /// It was killed at its deadline.
    #[error("{program} to {doing}: nothing within {DEADLINE:?}")]
    Late {
        /// The program.
        program: PathBuf,
        /// What for.
        doing: String,
    },
    /// It failed.
    #[error("{program} to {doing}: {status}: {said}{}", at(.line))]
    Failed {
        /// The program.
        program: PathBuf,
        /// What for.
        doing: String,
        /// How it ended.
        status: ExitStatus,
        /// Its complaint, in one line.
        said: String,
        /// The line that it complained of.
        line: Option<String>,
    },
    /// It says more than anybody can mean.
    #[error("{program} says more than {SAVE_BYTES} bytes")]
    TooMuch {
        /// The program.
        program: PathBuf,
    },
}

fn at(line: &Option<String>) -> String {
    line.as_ref()
        .map_or_else(String::new, |line| format!(" (at: {line})"))
}

/// Programs of one variant that were seen to work.
#[derive(Debug, Clone)]
pub struct Iptables {
    variant: Variant,
    sides: Vec<Side>,
}

/// Those of one family.
#[derive(Debug, Clone)]
struct Side {
    family: Family,
    save: PathBuf,
    restore: PathBuf,
    able: Able,
    /// Whether `iptables-restore` knows of waiting (1.6.2).
    waits: bool,
}

/// What was found, and what was tried and did not work.
#[derive(Debug)]
pub struct Found {
    /// The variants that work, the preferred one first. The others may hold leftovers.
    pub working: Vec<Iptables>,
    /// Why the others do not, or not for a family or a table.
    pub failures: Vec<IptablesError>,
}

/// Tries the programs: each table must be readable, and a change of nothing must be taken.
///
/// With x_tables this makes the kernel set up the tables that it has, empty.
///
/// # Errors
/// [`IptablesError::Unsupported`].
pub async fn probe(namespace: Namespace<'_>) -> Result<Found, IptablesError> {
    probe_in(&directories(), namespace).await
}

/// The programs that are installed, to be asked and for nothing else: nothing was tried, so nothing was changed.
#[must_use]
pub fn installed() -> Vec<Iptables> {
    let directories = directories();
    let side = |variant: Variant, family| {
        let find = |verb| find(&directories, variant.program(family, verb)).ok();
        Some(Side {
            family,
            save: find("save")?,
            restore: find("restore")?,
            able: Able::default(),
            waits: true,
        })
    };
    let of = |variant| Iptables {
        variant,
        sides: Family::ALL
            .into_iter()
            .filter_map(|family| side(variant, family))
            .collect(),
    };
    Variant::ALL.into_iter().map(of).collect()
}

fn directories() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = DIRECTORIES.iter().map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).collect()
}

/// As [`probe`], with the programs of these directories.
///
/// # Errors
/// [`IptablesError::Unsupported`].
pub async fn probe_in(directories: &[PathBuf], namespace: Namespace<'_>) -> Result<Found, IptablesError> {
    if let Namespace::Other(_) = namespace {
        return Err(IptablesError::Unsupported);
    }
    let mut found = Found {
        working: Vec::new(),
        failures: Vec::new(),
    };
    for variant in Variant::ALL {
        let mut sides = Vec::new();
        for family in Family::ALL {
            match Side::probe(directories, variant, family, &mut found.failures).await {
                Ok(side) => sides.push(side),
                Err(error) => found.failures.push(error),
            }
        }
        if !sides.is_empty() {
            found.working.push(Iptables { variant, sides });
        }
    }
    Ok(found)
}

impl Iptables {
    /// Which programs these are.
    #[must_use]
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// The program that says what is there.
    #[must_use]
    pub fn saves_by(&self, family: Family) -> String {
        self.variant.program(family, "save")
    }

    /// What works for a family; no table where it does not work at all.
    #[must_use]
    pub fn able(&self, family: Family) -> Able {
        self.side(family)
            .map_or_else(|_| Able::default(), |side| side.able.clone())
    }

    /// What carries the tag in all tables of a family. One run of one program. Cancel safe.
    ///
    /// # Errors
    /// [`IptablesError`].
    pub async fn observe(&self, family: Family, tag: &str) -> Result<Observed, IptablesError> {
        Ok(parse(tag, &self.save(family).await?))
    }

    /// All tables of a family as text, for finding leftovers of any tag. Cancel safe.
    ///
    /// # Errors
    /// [`IptablesError`].
    pub async fn save(&self, family: Family) -> Result<String, IptablesError> {
        self.side(family)?.save(&[]).await
    }

    /// Makes a change; tried again a few times when the program lacked a resource, such as the lock.
    ///
    /// # Errors
    /// [`IptablesError`]; tables before the one that failed are changed, so look again.
    pub async fn apply(&self, family: Family, change: &Restore) -> Result<(), IptablesError> {
        self.change(family, &change.to_string()).await
    }

    /// The same with a text for `iptables-restore --noflush`.
    ///
    /// # Errors
    /// [`IptablesError`].
    pub async fn change(&self, family: Family, text: &str) -> Result<(), IptablesError> {
        let doing = format!("change {family} tables");
        self.side(family)?.insist(text, &doing, &[]).await
    }

    fn side(&self, family: Family) -> Result<&Side, IptablesError> {
        let side = self.sides.iter().find(|side| side.family == family);
        side.ok_or(IptablesError::NoFamily(family))
    }
}

impl Side {
    async fn probe(
        directories: &[PathBuf],
        variant: Variant,
        family: Family,
        failures: &mut Vec<IptablesError>,
    ) -> Result<Self, IptablesError> {
        let find = |verb| find(directories, variant.program(family, verb));
        let mut side = Self {
            family,
            save: find("save")?,
            restore: find("restore")?,
            able: Able::default(),
            waits: true,
        };
        side.try_table(Table::Filter).await?;
        for table in [Table::Mangle, Table::Nat] {
            if let Err(error) = side.try_table(table).await {
                failures.push(error);
            }
        }
        side.try_marks().await;
        Ok(side)
    }

    /// Only looks whether the program and its kernel know the target: nothing is made.
    async fn try_marks(&mut self) {
        let rule = format!("-A PREROUTING -j CONNMARK --restore-mark --nfmask {MASK:#x} --ctmask {MASK:#x}");
        let tried = format!("*{}\n{rule}\nCOMMIT\n", Table::Mangle);
        let doing = format!("try {} CONNMARK", self.family);
        self.able.marks = self.insist(&tried, &doing, &["--test"]).await.is_ok();
    }

    async fn try_table(&mut self, table: Table) -> Result<(), IptablesError> {
        self.save(&["-t", table.name()]).await?;
        let nothing = format!("*{table}\nCOMMIT\n");
        if let Err(error) = self.restore(&nothing).await {
            if !self.waits {
                return Err(error);
            }
            self.waits = false;
            self.restore(&nothing).await.map_err(|_| error)?;
        }
        self.able.tables.insert(table);
        Ok(())
    }

    async fn save(&self, arguments: &[&str]) -> Result<String, IptablesError> {
        let said = run(&self.save, arguments, "", &format!("read {} tables", self.family)).await?;
        Ok(String::from_utf8_lossy(&said).into_owned())
    }

    async fn restore(&self, text: &str) -> Result<(), IptablesError> {
        let doing = format!("change {} tables", self.family);
        self.give(text, &doing, &[]).await
    }

    /// The same, again for a few times where a resource is lacking.
    async fn insist(&self, text: &str, doing: &str, more: &[&str]) -> Result<(), IptablesError> {
        for pause in PAUSES {
            match self.give(text, doing, more).await {
                Err(IptablesError::Failed { status, .. }) if status.code() == Some(RESOURCE_PROBLEM) => {
                    tokio::time::sleep(pause).await;
                }
                other => return other,
            }
        }
        self.give(text, doing, more).await
    }

    async fn give(&self, text: &str, doing: &str, more: &[&str]) -> Result<(), IptablesError> {
        let lock: &[&str] = if self.waits { &[LOCK] } else { &[] };
        let arguments = [&["--noflush"], lock, more].concat();
        run(&self.restore, &arguments, text, doing).await.map(drop)
    }
}

fn find(directories: &[PathBuf], name: String) -> Result<PathBuf, IptablesError> {
    let mut there = directories.iter().map(|directory| directory.join(&name));
    there
        .find(|path| path.is_file())
        .ok_or(IptablesError::Missing(name))
}

/// Runs a program to its end and returns what it said.
async fn run(program: &Path, arguments: &[&str], input: &str, doing: &str) -> Result<Vec<u8>, IptablesError> {
    let talk = talk(program, arguments, input);
    let (program, doing) = (program.to_owned(), doing.to_owned());
    let (status, said, complaint) = match tokio::time::timeout(DEADLINE, talk).await {
        Err(_) => return Err(IptablesError::Late { program, doing }),
        Ok(Err(source)) => {
            return Err(IptablesError::Run {
                program,
                doing,
                source,
            });
        }
        Ok(Ok(ended)) => ended,
    };
    if said.len() as u64 > SAVE_BYTES {
        return Err(IptablesError::TooMuch { program });
    }
    if !status.success() {
        let text = String::from_utf8_lossy(&complaint);
        return Err(IptablesError::Failed {
            program,
            doing,
            status,
            line: complained_of(&text, input),
            said: one_line(&text),
        });
    }
    Ok(said)
}

async fn talk(program: &Path, arguments: &[&str], input: &str) -> io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            let _ = stdin.write_all(input.as_bytes()).await; // one that does not listen says why, or fails
        }
    };
    let ((), said, complaint) = tokio::join!(
        write,
        bounded(stdout, SAVE_BYTES + 1),
        bounded(stderr, COMPLAINT_BYTES)
    );
    let (said, complaint) = (said?, complaint?); // both pipes are closed: it ends or cannot write any more
    Ok((child.wait().await?, said, complaint))
}

async fn bounded(pipe: Option<impl AsyncRead + Unpin>, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(limit).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

/// A text that no terminal takes for a command.
fn one_line(text: &str) -> String {
    let words = text.split(char::is_whitespace).filter(|word| !word.is_empty());
    let plain = |word: &str| word.chars().filter(|c| !c.is_control()).collect::<String>();
    words.map(plain).collect::<Vec<_>>().join(" ")
}

/// The line of the input that a complaint names by its number.
fn complained_of(complaint: &str, input: &str) -> Option<String> {
    let lower = complaint.to_ascii_lowercase();
    let (_, after) = lower.split_once("line: ").or_else(|| lower.split_once("line "))?;
    let digits = after.split(|c: char| !c.is_ascii_digit()).next()?;
    let number: usize = digits.parse().ok()?;
    input.lines().nth(number.checked_sub(1)?).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_names_its_line() {
        assert_eq!(one_line("a\n\n b\u{1b}[1m `c'\n"), "a b[1m `c'");
        let input = "*filter\n:sv5pkj-forward - [0:0]\n-D FORWARD -j x\nCOMMIT\n";
        // As 1.8.9 said it.
        for (said, line) in [
            ("iptables-restore: line 2 failed", Some(":sv5pkj-forward - [0:0]")),
            (
                "x v1.8.9 (legacy): Couldn't load target `x'\n\nError occurred at line: 3\nTry",
                Some("-D FORWARD -j x"),
            ),
            (
                "iptables-nft-restore v1.8.9 (nf_tables): \nline 4: CHAIN_DEL failed (Device or resource busy)",
                Some("COMMIT"),
            ),
            ("no line here", None),
            ("line 0 failed", None),
            ("line 99999999999999999999999 failed", None),
            ("", None),
        ] {
            assert_eq!(complained_of(said, input).as_deref(), line, "{said}");
        }
    }
}
