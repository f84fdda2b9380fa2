//! The image by way of the build crates: the only file that knows their interface.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use sovereign_protocol::spec::Image;
use sovereign_rootfs::{Arch, Artifacts, Build, Error, Lock, LockError, Progress};

use crate::agent::Binaries;
use crate::clock::seconds;
use crate::config::{Images, RECIPE, Settings};
use crate::context::{Context, escaped, talk};
use crate::error::{CommandError, Kind};

/// The name of the first recipe's lock beside the configuration; without that file the cache keeps one.
const LOCK: &str = "sovereign.lock";

/// How the lock is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LockUse {
    /// Followed; what is gone everywhere is resolved anew into a local lock.
    Followed,
    /// Followed exactly, or there is no image.
    Exact,
    /// Resolved anew and written.
    Renewed,
}

/// A finished image.
#[derive(Debug)]
pub(crate) struct Built {
    /// Its recipe.
    pub(crate) recipe: String,
    /// Its files.
    pub(crate) image: Image,
    /// The release of its kernel.
    pub(crate) kernel_version: String,
    /// False when everything came from the cache.
    pub(crate) fresh: bool,
    /// The lock that was followed.
    pub(crate) lock: PathBuf,
    /// What a renewed lock has changed; nothing when it was not renewed, or is as before.
    pub(crate) change: Option<String>,
}

/// Builds the images of all guests, or finds them in the cache; tells its progress on stderr. Never none.
///
/// # Errors
/// `Configuration` for recipe, mirror and lock; `NotReached` when something could not be had.
pub(crate) async fn make(
    context: &Context,
    settings: &Settings,
    binaries: &Binaries,
    lock: LockUse,
) -> Result<Vec<Built>, CommandError> {
    let mut built = Vec::new();
    for recipe in settings.recipes() {
        built.push(make_one(Inputs::new(context, settings, recipe, binaries)?, lock).await?);
    }
    Ok(built)
}

/// The images that were made, for the guests that boot them.
pub(crate) fn images(built: &[Built]) -> Images {
    let by_recipe: BTreeMap<String, Image> = built
        .iter()
        .map(|built| (built.recipe.clone(), built.image.clone()))
        .collect();
    Images::new(unknown_image(), by_recipe)
}

async fn make_one(inputs: Inputs, lock: LockUse) -> Result<Built, CommandError> {
    let job = move || {
        let mut teller = Teller::default();
        let request = inputs.request(lock);
        let path = request.lock_file();
        // Only a renewed lock has changed; every `up` comes through here.
        let renewed = || {
            (lock == LockUse::Renewed)
                .then(|| Lock::load(&path).ok().flatten())
                .flatten()
        };
        let before = renewed();
        let artifacts =
            sovereign_rootfs::build(&request, &mut |progress| teller.tell(&progress)).map_err(failed)?;
        let change = before
            .zip(renewed())
            .and_then(|(before, after)| before.difference(&after));
        Ok(Built {
            kernel_version: artifacts.kernel_version.clone(),
            fresh: artifacts.built,
            image: image(artifacts),
            recipe: inputs.recipe.clone(),
            change,
            lock: path,
        })
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

/// The images that are in the cache, and the recipes of those that are not; makes and fetches nothing.
///
/// # Errors
/// As [`make`], for what cannot be read.
pub(crate) fn find(
    context: &Context,
    settings: &Settings,
    binaries: &Binaries,
) -> Result<(Images, Vec<String>), CommandError> {
    let (mut images, mut missing) = (BTreeMap::new(), Vec::new());
    for recipe in settings.recipes() {
        let inputs = Inputs::new(context, settings, recipe, binaries)?;
        let found = sovereign_rootfs::find(&inputs.request(LockUse::Followed), &mut |_| {});
        match found.map_err(failed)? {
            Some(artifacts) => drop(images.insert(recipe.to_owned(), image(artifacts))),
            None => missing.push(recipe.to_owned()),
        }
    }
    Ok((Images::new(unknown_image(), images), missing))
}

/// Stands in for what is not built yet; its files are not compared.
fn unknown_image() -> Image {
    Image {
        kernel: "unbuilt".into(),
        initramfs: "unbuilt".into(),
        root: "unbuilt".into(),
        agent: "unbuilt".into(),
        digest: String::new(),
    }
}

/// Where the lock of a recipe that one keeps with the configuration is, there or not.
pub(crate) fn kept_lock(settings: &Settings, recipe: &str) -> PathBuf {
    let name = match recipe {
        RECIPE => LOCK.to_owned(),
        other => format!("sovereign-{other}.lock"),
    };
    settings.path.parent().unwrap_or(Path::new("")).join(name)
}

/// Keeps a copy of the lock that was followed beside the configuration; false when one is there already.
///
/// # Errors
/// `Configuration`, when it cannot be read or written.
pub(crate) fn keep_lock(settings: &Settings, recipe: &str, followed: &Path) -> Result<bool, CommandError> {
    let kept = kept_lock(settings, recipe);
    if kept.exists() {
        return Ok(false);
    }
    let unwritten = |error: LockError| {
        let message = format!("cannot keep {} as {}", followed.display(), kept.display());
        CommandError::new(Kind::Configuration, "LockUnwritable", message)
            .because(error)
            .next("make the directory writable, then: sovereign build --keep-lock")
    };
    match Lock::load(followed).map_err(unwritten)? {
        Some(lock) => lock.save(&kept).map(|()| true).map_err(unwritten),
        None => Err(unwritten(LockError::Absent {
            path: followed.to_owned(),
        })),
    }
}

/// What goes into an image.
struct Inputs {
    cache: PathBuf,
    lock: Option<PathBuf>,
    settings: Settings,
    recipe: String,
    binaries: Binaries,
}

impl Inputs {
    fn new(
        context: &Context,
        settings: &Settings,
        recipe: &str,
        binaries: &Binaries,
    ) -> Result<Self, CommandError> {
        let lock = kept_lock(settings, recipe);
        Ok(Self {
            cache: context.environment.cache()?,
            lock: lock.exists().then_some(lock),
            settings: settings.clone(),
            recipe: recipe.to_owned(),
            binaries: binaries.clone(),
        })
    }

    fn request(&self, lock: LockUse) -> Build<'_> {
        Build {
            cache: &self.cache,
            mirror: self.settings.mirror.as_deref(),
            snapshot: self.settings.snapshot.as_deref(),
            arch: Arch::Amd64, // the guest binaries beside us are x86_64
            recipe: &self.recipe,
            locked: lock == LockUse::Exact,
            update: lock == LockUse::Renewed,
            init: &self.binaries.init,
            agent: &self.binaries.guest,
            lock: self.lock.as_deref(),
        }
    }
}

fn image(artifacts: Artifacts) -> Image {
    Image {
        kernel: artifacts.kernel,
        initramfs: artifacts.initramfs,
        root: artifacts.root,
        agent: artifacts.agent_disk,
        digest: artifacts.digest,
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
        Error::Lock(LockError::Parse { .. } | LockError::Damaged { .. } | LockError::DoesNotFit { .. }) => (
            Kind::Configuration,
            "Lock",
            "restore or remove the lock file, then: sovereign build",
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

    const LOCK_TEXT: &str = "format = 1\nsuite = \"bookworm\"\narch = \"amd64\"\nkernel = \"linux\"\n\n[packages.linux]\n\
        version = \"6.1\"\narch = \"amd64\"\narchive = \"main\"\n\
        sha256 = \"0000000000000000000000000000000000000000000000000000000000000000\"\nsize = 1\npath = \"pool/l.deb\"\n";

    #[test]
    fn the_cache_s_lock_is_kept_beside_the_configuration_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(crate::config::FILE);
        let settings = crate::config::parse(&path, &crate::config::template()).unwrap();
        let cached = dir.path().join("cached.lock");
        let error = keep_lock(&settings, RECIPE, &cached).unwrap_err();
        assert_eq!(
            (error.kind, error.reason.as_str()),
            (Kind::Configuration, "LockUnwritable")
        );
        std::fs::write(&cached, LOCK_TEXT).unwrap();
        assert!(keep_lock(&settings, RECIPE, &cached).unwrap());
        let kept = std::fs::read_to_string(dir.path().join("sovereign.lock")).unwrap();
        assert!(
            kept.contains("[packages.linux]") && kept.contains("build --update"),
            "{kept}"
        );
        assert!(
            !keep_lock(&settings, RECIPE, &cached).unwrap(),
            "one that is there is never replaced"
        );
    }

    #[test]
    fn the_kept_lock_is_followed_and_else_the_cache_s_own() {
        let dir = tempfile::tempdir().unwrap();
        let mut context = Context::in_dir(dir.path());
        context.environment.cache_home = Some(dir.path().join("cache"));
        let path = dir.path().join(crate::config::FILE);
        let settings = crate::config::parse(&path, &crate::config::template()).unwrap();
        let binaries = Binaries {
            host: "h".into(),
            init: "i".into(),
            guest: "g".into(),
        };
        let followed = |lock| {
            let inputs = Inputs::new(&context, &settings, RECIPE, &binaries).unwrap();
            let request = inputs.request(lock);
            (request.lock_file(), request.locked, request.update)
        };
        let own = dir.path().join("cache/sovereign/postgresql-17-amd64.lock");
        assert_eq!(followed(LockUse::Followed), (own.clone(), false, false));
        assert_eq!(followed(LockUse::Renewed), (own, false, true));
        let kept = dir.path().join("sovereign.lock");
        std::fs::write(&kept, LOCK_TEXT).unwrap();
        assert_eq!(followed(LockUse::Exact), (kept.clone(), true, false));
        assert_eq!(followed(LockUse::Renewed), (kept, false, true));
    }

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
