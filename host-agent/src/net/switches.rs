//! The kernel's switches of one namespace: read, set, and put back as they were.
//!
//! What a switch was is on disk before it is changed, so that whoever comes after a kill can put it back. A document of
//! its own beside the store, because it must be written in the middle of a plan and read without the store's owner.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, openat};
use serde::{Deserialize, Serialize};
use sovereign_reconcile::plan::Step;
use sovereign_reconcile::sysctl::Sysctl;
use sovereign_reconcile::wanted::{Prior, Switched};

use crate::files;

/// Bytes of a switch's text that are read; a number is shorter.
const TEXT_BYTES: u64 = 64;

/// Why a switch was not set.
#[derive(Debug, thiserror::Error)]
pub(super) enum SwitchError {
    /// The kernel said no.
    #[error("cannot set it")]
    Set(#[source] io::Error),
    /// What it was cannot be kept on disk, so it was left as it is.
    #[error("cannot keep what it was: {0}")]
    Keep(String),
}

/// Where switches are. A file below `/proc/sys/net` is that of the namespace of whoever opens it.
#[derive(Debug)]
pub(super) enum Place {
    /// `/proc/sys/net`, for the namespace that we are in.
    Directory(OwnedFd),
    /// These and no others, opened in the namespace that is meant.
    Files(BTreeMap<Sysctl, File>),
}

impl Place {
    /// The same again, for another record.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Directory(directory) => Self::Directory(directory.try_clone()?),
            Self::Files(files) => {
                let copies = files
                    .iter()
                    .map(|(sysctl, file)| Ok((sysctl.clone(), file.try_clone()?)));
                Self::Files(copies.collect::<io::Result<_>>()?)
            }
        })
    }
}

/// What is kept on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The boot of this machine in which they were set: another one began with switches of its own.
    boot: String,
    switched: Vec<(Sysctl, Prior)>,
}

fn boot() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(text.trim().to_owned())
}

/// The switches of a namespace.
#[derive(Debug)]
pub(super) struct Switches {
    place: Place,
    record: PathBuf,
    boot: String,
    switched: Switched,
}

impl Switches {
    /// Those of `place`; `record` is where former values are kept.
    ///
    /// # Errors
    /// When the record is there and cannot be read: then nothing is known of what is to be put back.
    pub(super) fn open(place: Place, record: PathBuf) -> io::Result<Self> {
        let text = files::read_optional(&record).map_err(|error| io::Error::other(format!("{error:#}")))?;
        let kept = text
            .map(|text| serde_json::from_slice::<Record>(&text))
            .transpose();
        let kept = kept.map_err(|error| {
            let path = record.display();
            io::Error::other(format!(
                "{path}, which keeps what switches were, cannot be understood ({error}): put back by hand what it says, and remove it"
            ))
        })?;
        let boot = boot()?;
        let of_this_boot = kept.filter(|kept| kept.boot == boot);
        let pairs = of_this_boot.map(|kept| kept.switched).unwrap_or_default();
        Ok(Self {
            place,
            record,
            boot,
            switched: pairs.into_iter().collect(),
        })
    }

    /// What was changed.
    pub(super) fn switched(&self) -> &Switched {
        &self.switched
    }

    /// What puts those back that are still as we set them.
    pub(super) fn to_restore(&self) -> Vec<Step> {
        let now = self.read(&self.switched.keys().cloned().collect());
        let ours = self
            .switched
            .iter()
            .filter(|(sysctl, prior)| now.get(sysctl) == Some(&prior.set));
        let step = |(sysctl, prior): (&Sysctl, &Prior)| Step::RestoreSysctl {
            sysctl: sysctl.clone(),
            from: prior.set,
            to: prior.before,
        };
        ours.map(step).collect()
    }

    /// Forgets what switches of links were that are gone: one that comes back under their name has its own.
    pub(super) fn forget_gone(&mut self, is_there: impl Fn(&str) -> bool) {
        let stays = |sysctl: &Sysctl| sysctl.link().is_none_or(|link| is_there(link.as_str()));
        if self.switched.keys().all(stays) {
            return;
        }
        let mut switched = self.switched.clone();
        switched.retain(|sysctl, _| stays(sysctl));
        if let Err(error) = self.keep(switched) {
            tracing::warn!(%error, "former values of links that are gone stay on record");
        }
    }

    /// The values of those that are there.
    pub(super) fn read(&self, which: &BTreeSet<Sysctl>) -> BTreeMap<Sysctl, i64> {
        let value = |sysctl: &Sysctl| Some((sysctl.clone(), self.value(sysctl).ok()?));
        which.iter().filter_map(value).collect()
    }

    fn value(&self, sysctl: &Sysctl) -> io::Result<i64> {
        let mut text = String::new();
        let file = self.file(sysctl, OFlags::RDONLY)?;
        file.take(TEXT_BYTES).read_to_string(&mut text)?;
        text.trim().parse().map_err(io::Error::other)
    }

    /// Sets a switch; how it was is on disk before.
    pub(super) fn set(&mut self, sysctl: &Sysctl, from: i64, to: i64) -> Result<(), SwitchError> {
        if !sysctl.goes_with_our_link() {
            let before = match self.switched.get(sysctl) {
                Some(prior) if prior.set == from => prior.before,
                _ => from, // as somebody else left it
            };
            let prior = Prior { before, set: to };
            if self.switched.get(sysctl) != Some(&prior) {
                let mut switched = self.switched.clone();
                switched.insert(sysctl.clone(), prior);
                self.keep(switched)?;
            }
        }
        self.write(sysctl, to)
    }

    /// Puts a switch back; then it is forgotten.
    pub(super) fn restore(&mut self, sysctl: &Sysctl, to: i64) -> Result<(), SwitchError> {
        self.write(sysctl, to)?;
        let mut switched = self.switched.clone();
        switched.remove(sysctl);
        self.keep(switched)
    }

    fn write(&self, sysctl: &Sysctl, to: i64) -> Result<(), SwitchError> {
        let written = self
            .file(sysctl, OFlags::WRONLY)
            .and_then(|mut file| file.write_all(to.to_string().as_bytes()));
        written.map_err(SwitchError::Set)
    }

    fn file(&self, sysctl: &Sysctl, flags: OFlags) -> io::Result<File> {
        let directory = match &self.place {
            Place::Directory(directory) => directory,
            Place::Files(files) => {
                let file = files.get(sysctl).ok_or(io::ErrorKind::NotFound)?;
                let mut file = file.try_clone()?;
                file.seek(SeekFrom::Start(0))?; // a switch is written from its beginning (sysctl_writes_strict)
                return Ok(file);
            }
        };
        let opened = openat(directory, sysctl.file(), flags | OFlags::CLOEXEC, Mode::empty())?;
        Ok(File::from(opened))
    }

    fn keep(&mut self, switched: Switched) -> Result<(), SwitchError> {
        let kept = if switched.is_empty() {
            files::remove(&self.record)
        } else {
            let record = Record {
                boot: self.boot.clone(),
                switched: switched.clone().into_iter().collect(),
            };
            let text = serde_json::to_vec(&record).map_err(|error| SwitchError::Keep(error.to_string()))?;
            files::replace(&self.record, &text)
        };
        kept.map_err(|error| SwitchError::Keep(format!("{error:#}")))?;
        self.switched = switched;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use sovereign_reconcile::names::LinkName;

    use super::*;

    /// A directory in the place of /proc/sys/net.
    fn switches(dir: &std::path::Path) -> Switches {
        std::fs::create_dir_all(dir.join("ipv4")).unwrap();
        let directory = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        Switches::open(Place::Directory(directory), dir.join("record")).unwrap()
    }

    #[test]
    fn what_a_switch_was_outlives_us_and_is_forgotten_when_it_is_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ipv4/ip_forward");
        let mut first = switches(dir.path());
        std::fs::write(&file, "0\n").unwrap();
        let forward = Sysctl::ForwardV4;
        let all = BTreeSet::from([forward.clone(), Sysctl::ForwardV6]);
        assert_eq!(
            first.read(&all),
            BTreeMap::from([(forward.clone(), 0)]),
            "one is not there"
        );
        first.set(&forward, 0, 1).unwrap();
        let mut second = switches(dir.path());
        assert_eq!(second.switched()[&forward], Prior { before: 0, set: 1 });
        std::fs::write(&file, "0\n").unwrap(); // the hotspot goes off
        second.set(&forward, 0, 1).unwrap();
        assert_eq!(second.switched()[&forward], Prior { before: 0, set: 1 });
        second.restore(&forward, 0).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap().trim(), "0");
        assert!(switches(dir.path()).switched().is_empty());
        assert!(!dir.path().join("record").exists());
    }

    #[test]
    fn a_switch_that_was_passed_is_set_and_no_other_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ip_forward");
        std::fs::write(&path, "0\n").unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let place = Place::Files(BTreeMap::from([(Sysctl::ForwardV4, file)]));
        let mut switches = Switches::open(place, dir.path().join("record")).unwrap();
        let all = BTreeSet::from([Sysctl::ForwardV4, Sysctl::ForwardV6]);
        for value in [0, 1, 0] {
            if value != 0 {
                switches.set(&Sysctl::ForwardV4, 0, value).unwrap();
            } else if !switches.switched().is_empty() {
                switches.restore(&Sysctl::ForwardV4, value).unwrap();
            }
            assert_eq!(switches.read(&all), BTreeMap::from([(Sysctl::ForwardV4, value)]));
        }
        assert!(switches.set(&Sysctl::ForwardV6, 0, 1).is_err());
    }

    #[test]
    fn what_a_switch_of_a_link_was_is_forgotten_with_the_link() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = switches(dir.path());
        let accepts = |name| Sysctl::AcceptAdvertisements(LinkName::parse(name).unwrap());
        for name in ["eth0", "usb0"] {
            let file = dir.path().join(accepts(name).file());
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, "1").unwrap();
            first.set(&accepts(name), 1, 2).unwrap();
        }
        first.set(&Sysctl::ForwardV4, 0, 1).unwrap_err(); // it is kept before it is set, and there is none here
        first.forget_gone(|name| name != "usb0");
        let second = switches(dir.path());
        let kept: Vec<Sysctl> = second.switched().keys().cloned().collect();
        assert_eq!(kept, [accepts("eth0"), Sysctl::ForwardV4]);
    }

    #[test]
    fn what_another_boot_began_with_is_not_ours_to_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = switches(dir.path());
        std::fs::write(dir.path().join("ipv4/ip_forward"), "0").unwrap();
        first.set(&Sysctl::ForwardV4, 0, 1).unwrap();
        assert_eq!(first.to_restore().len(), 1);
        let record = dir.path().join("record");
        let text = std::fs::read_to_string(&record).unwrap();
        assert!(text.contains(&boot().unwrap()), "{text}");
        std::fs::write(&record, text.replace(&boot().unwrap(), "another")).unwrap();
        assert!(switches(dir.path()).to_restore().is_empty());
    }

    /// Whose boot it was in is not known: what it says may be as another boot began.
    #[test]
    fn a_record_that_cannot_be_understood_is_named_and_nothing_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("record");
        for text in ["[[\"forward_v4\",{\"before\":0,\"set\":1}]]", "{", ""] {
            std::fs::write(&record, text).unwrap();
            let place = Place::Files(BTreeMap::new());
            let error = Switches::open(place, record.clone()).unwrap_err().to_string();
            assert!(error.starts_with(record.to_str().unwrap()), "{error}");
            assert_eq!(
                std::fs::read_to_string(&record).unwrap(),
                text,
                "it is left for people"
            );
        }
    }

    #[test]
    fn a_switch_is_not_touched_when_it_cannot_be_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ipv4/ip_forward");
        let mut switches = switches(dir.path());
        std::fs::write(&file, "0").unwrap();
        switches.record = dir.path().join("no/such/directory");
        for _ in 0..2 {
            let error = switches.set(&Sysctl::ForwardV4, 0, 1).unwrap_err();
            assert!(matches!(error, SwitchError::Keep(_)), "{error}");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "0");
        }
    }
}
