//! The image by way of the build crates: the only file that knows their interface.

use std::path::{Path, PathBuf};
use std::time::Instant;

use sovereign_protocol::spec::Image;
use sovereign_rootfs::{Arch, Artifacts, Build, Error, Progress};

use crate::agent::Binaries;
use crate::clock::seconds;
use crate::config::Settings;
use crate::context::{Context, escaped, talk};
use crate::error::{CommandError, Kind};

/// The lock's name beside the configuration; without that file the cache keeps one.
const LOCK: &str = "sovereign.lock";

/// A finished image.
#[derive(Debug)]
pub(crate) struct Built {
    /// Its files.
    pub(crate) image: Image,
    /// The release of its kernel.
    pub(crate) kernel_version: String,
    /// False when everything came from the cache.
    pub(crate) fresh: bool,
}

/// Builds the image or finds it in the cache; tells its progress on stderr.
///
/// # Errors
/// `Configuration` for recipe, mirror and lock; `NotReached` when something could not be had.
pub(crate) async fn make(
    context: &Context,
    settings: &Settings,
    binaries: &Binaries,
    locked: bool,
) -> Result<Built, CommandError> {
    let inputs = Inputs::new(context, settings, binaries)?;
    let job = move || {
        let mut teller = Teller::default();
        let built = sovereign_rootfs::build(&inputs.request(locked), &mut |progress| teller.tell(&progress));
        built.map(finished).map_err(failed)
    };
    // On a thread of its own, so that Ctrl-C ends `up` at once; results are renamed into place.
    tokio::task::spawn_blocking(job).await.map_err(|error| {
        CommandError::new(
            Kind::Internal,
            "BuildPanicked",
            "the image build ended unexpectedly",
        )
        .because(error)
    })?
}

/// The image, if it is in the cache; makes and fetches nothing.
///
/// # Errors
/// As [`make`], for what cannot be read.
pub(crate) fn find(
    context: &Context,
    settings: &Settings,
    binaries: &Binaries,
) -> Result<Option<Image>, CommandError> {
    let inputs = Inputs::new(context, settings, binaries)?;
    let found = sovereign_rootfs::find(&inputs.request(false), &mut |_| {});
    Ok(found.map_err(failed)?.map(|artifacts| finished(artifacts).image))
}

/// What goes into an image.
struct Inputs {
    cache: PathBuf,
    lock: Option<PathBuf>,
    settings: Settings,
    binaries: Binaries,
}

impl Inputs {
    fn new(context: &Context, settings: &Settings, binaries: &Binaries) -> Result<Self, CommandError> {
        let lock = settings.path.parent().unwrap_or(Path::new("")).join(LOCK);
        Ok(Self {
            cache: context.environment.cache()?,
            lock: lock.exists().then_some(lock),
            settings: settings.clone(),
            binaries: binaries.clone(),
        })
    }

    fn request(&self, locked: bool) -> Build<'_> {
        Build {
            cache: &self.cache,
            mirror: self.settings.mirror.as_deref(),
            snapshot: self.settings.snapshot.as_deref(),
            arch: Arch::Amd64, // the guest binaries beside us are x86_64
            recipe: &self.settings.recipe,
            locked,
            update: false,
            init: &self.binaries.init,
            agent: &self.binaries.guest,
            lock: self.lock.as_deref(),
        }
    }
}

fn finished(artifacts: Artifacts) -> Built {
    Built {
        image: Image {
            kernel: artifacts.kernel,
            initramfs: artifacts.initramfs,
            root: artifacts.root,
            agent: artifacts.agent_disk,
            digest: artifacts.digest,
        },
        kernel_version: artifacts.kernel_version,
        fresh: artifacts.built,
    }
}

fn failed(error: Error) -> CommandError {
    let (kind, reason, next) = match &error {
        Error::UnknownRecipe { .. } => (
            Kind::Configuration,
            "UnknownRecipe",
            "edit [build] recipe, then: sovereign build",
        ),
        Error::Mirror(_) => (
            Kind::Configuration,
            "NoMirror",
            "edit [build] mirror, then: sovereign build",
        ),
        Error::Lock(_) | Error::LockedGone { .. } => (Kind::Configuration, "Lock", "sovereign build"),
        Error::Key(_) | Error::Repository(_) | Error::Download(_) => {
            (Kind::NotReached, "Repository", "sovereign build")
        }
        Error::Package { .. } | Error::Tree { .. } | Error::Needed(_) | Error::Kernel(_) => {
            (Kind::NotReached, "BadPackage", "sovereign build")
        }
        Error::Erofs(_) => (
            Kind::NotReached,
            "Erofs",
            "apt-get install erofs-utils, then: sovereign build",
        ),
        Error::NoRoom { .. } => (Kind::NotReached, "NoRoom", "make room, then: sovereign build"),
        Error::Store(_) | Error::Io { .. } | Error::Panicked => {
            (Kind::Internal, "BuildFailed", "sovereign build")
        }
    };
    CommandError::new(kind, reason, "the image could not be built")
        .because(error)
        .next(next)
}

/// Tells steps with the time since the first one; downloads by quarters.
#[derive(Debug, Default)]
struct Teller {
    begun: Option<Instant>,
    quarter: Option<usize>,
}

impl Teller {
    fn tell(&mut self, progress: &Progress) {
        let elapsed = self.begun.get_or_insert_with(Instant::now).elapsed();
        if let Some(text) = self.text(progress) {
            talk(&format!("{:>8}  image  {}", seconds(elapsed), escaped(&text)));
        }
    }

    fn text(&mut self, progress: &Progress) -> Option<String> {
        match progress {
            Progress::Resolving { suite } => Some(format!("reading the index of {suite}")),
            Progress::Downloading { done, total } => {
                let quarter = Some(4 * done / (*total).max(1));
                let news = quarter != self.quarter;
                self.quarter = quarter;
                news.then(|| format!("downloaded {done} of {total} packages"))
            }
            Progress::Unpacking { packages } => Some(format!("unpacking {packages} packages")),
            Progress::WritingRoot => Some("writing the root image".to_owned()),
            Progress::Warning(text) => Some(format!("warning: {text}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downloads_are_told_by_quarters() {
        let mut teller = Teller::default();
        let told = (0..=100)
            .filter(|&done| teller.text(&Progress::Downloading { done, total: 100 }).is_some())
            .count();
        assert_eq!(told, 5);
    }

    #[test]
    fn a_missing_lock_is_exit_3_and_names_what_to_run() {
        let error = failed(Error::UnknownRecipe {
            name: "x".into(),
            known: "y".into(),
        });
        assert_eq!(error.kind, Kind::Configuration);
        let absent = sovereign_rootfs::LockError::Absent { path: "l".into() };
        assert_eq!(failed(Error::Lock(absent)).kind.exit_code(), 3);
    }

    #[test]
    fn a_package_gone_under_locked_is_exit_3_and_named() {
        let source = sovereign_rootfs::DownloadError::Gone {
            name: "libpq5".into(),
            version: "17.1-1".into(),
            places: vec![],
        };
        let error = failed(Error::LockedGone {
            lock: "sovereign.lock".into(),
            source,
        });
        assert_eq!(error.kind.exit_code(), 3);
        let text = error.human();
        assert!(
            text.contains("sovereign.lock") && text.contains("libpq5 17.1-1"),
            "{text}"
        );
    }
}
