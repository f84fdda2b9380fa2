//! Whole builds against the small repository, with the real mkfs.erofs.

use std::{
    collections::BTreeMap,
    io::BufRead as _,
    process::{Child, Command, Stdio},
};

use super::*;
use crate::{
    NeededError,
    fixture::{DATE, Fixture, files_below},
    testing::{TarEntry, deb},
};

/// The bytes of each artifact.
fn bytes(artifacts: &Artifacts) -> BTreeMap<&'static str, Vec<u8>> {
    let read = |path: &Path| fs::read(path).unwrap();
    BTreeMap::from([
        ("kernel", read(&artifacts.kernel)),
        ("initramfs", read(&artifacts.initramfs)),
        ("root", read(&artifacts.root)),
        ("agent disk", read(&artifacts.agent_disk)),
    ])
}

fn assert_same(left: &Artifacts, right: &Artifacts) {
    for ((name, left), (_, right)) in bytes(left).iter().zip(&bytes(right)) {
        assert!(!left.is_empty() && left == right, "{name} differs");
    }
}

#[test]
fn two_builds_far_from_each_other_give_the_same_bytes() {
    let (one, two) = (Fixture::new(), Fixture::new());
    let built = [one.build(false).unwrap(), two.build(false).unwrap()];
    assert_ne!(built[0].root, built[1].root);
    assert_same(&built[0], &built[1]);
    assert_eq!(built[0].digest, built[1].digest);
}

#[test]
fn a_cache_with_packages_needs_no_network_and_gives_the_same_bytes() {
    let fixture = Fixture::new();
    let first = fixture.build(false).unwrap();
    let before = bytes(&first);
    fixture.server.files.lock().unwrap().clear();
    let again = fixture.build(true).unwrap();
    assert!(first.built && !again.built);
    for directory in ["images", "kernels", "manifests", "indexes"] {
        fs::remove_dir_all(fixture.cache().join(directory)).unwrap();
    }
    let offline = fixture.build(true).unwrap();
    assert!(offline.built);
    assert!(bytes(&offline) == before, "other bytes");
}

#[test]
fn a_root_whose_programs_lack_a_library_is_no_image() {
    let fixture = Fixture::new();
    let stanza = fixture.package_of(
        "libpq5",
        "2",
        deb(&[TarEntry::file("./usr/bin/program", &fs::read("/bin/sh").unwrap())]),
    );
    fixture.suite(
        "/debian",
        "trixie-updates",
        "trixie-updates",
        DATE,
        &fixture.signer,
        &stanza,
    );
    let error = fixture.build(false).unwrap_err();
    let Error::Needed(NeededError::Missing { file, soname }) = &error else {
        panic!("{error}")
    };
    assert!(
        file == "usr/bin/program" && soname.starts_with("libc.so"),
        "{error}"
    );
    let images = files_below(&fixture.cache().join("images"));
    assert!(
        !images
            .keys()
            .any(|path| path.display().to_string().contains("root-")),
        "no root under its name"
    );
}

/// Nothing of any build is left between the finished files.
fn assert_no_remains(fixture: &Fixture) {
    let left: Vec<_> = files_below(&fixture.cache()).into_keys().collect();
    let odd = |path: &&PathBuf| {
        let text = path.strip_prefix(fixture.cache()).unwrap().display().to_string();
        text.contains(".tmp") || (text.starts_with("scratch/") && text != "scratch/gate")
    };
    assert_eq!(
        left.iter().filter(odd).collect::<Vec<_>>(),
        Vec::<&PathBuf>::new()
    );
}

#[test]
fn a_build_inside_another_builds_time_disturbs_neither() {
    let fixture = Fixture::new();
    let mut inner = None;
    let outer = fixture.build_watched(false, &mut |step| {
        if *step == Progress::WritingRoot {
            inner = Some(fixture.build(false).unwrap());
        }
    });
    let (outer, inner) = (outer.unwrap(), inner.unwrap());
    assert!(outer.built && inner.built);
    assert_same(&outer, &inner);
    assert_no_remains(&fixture);
    assert!(!fixture.build(true).unwrap().built);
}

/// This test program again, with only the named test in it, on a cache in `directory`.
fn child(test: &str, directory: &Path, wrap: &[&str]) -> Child {
    let program = std::env::current_exe().unwrap();
    let mut arguments = wrap.iter().map(std::ffi::OsStr::new).chain([program.as_os_str()]);
    Command::new(arguments.next().unwrap())
        .args(arguments)
        .args([
            "--exact",
            &format!("workshop::tests::{test}"),
            "--ignored",
            "--nocapture",
        ])
        .env("SOVEREIGN_TEST_DIRECTORY", directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn given_directory() -> Option<tempfile::TempDir> {
    let directory = std::env::var_os("SOVEREIGN_TEST_DIRECTORY")?;
    let mut inside = tempfile::tempdir_in(directory).unwrap();
    inside.disable_cleanup(true);
    Some(inside)
}

#[test]
#[ignore = "the child of what_a_killed_build_left_is_removed_by_the_next"]
fn a_build_that_waits_to_be_killed() {
    let Some(directory) = given_directory() else {
        return;
    };
    println!("in {}", directory.path().display());
    let fixture = Fixture::in_directory(directory);
    let _ = fixture.build_watched(false, &mut |step| {
        if *step == Progress::WritingRoot {
            println!("writing");
            loop {
                thread::park();
            }
        }
    });
}

#[test]
fn what_a_killed_build_left_is_removed_by_the_next() {
    let outside = tempfile::tempdir().unwrap();
    let mut child = child("a_build_that_waits_to_be_killed", outside.path(), &[]);
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let place = lines
        .find_map(|line| line.strip_prefix("in ").map(PathBuf::from))
        .unwrap();
    lines.find(|line| line == "writing").unwrap();
    // The kernel's part of the build goes on meanwhile; it is cut wherever it is.
    child.kill().unwrap();
    child.wait().unwrap();

    let mut fixture = Fixture::new();
    fs::rename(place.join("cache"), fixture.cache()).unwrap();
    let remains = fs::read_dir(fixture.cache().join("scratch")).unwrap().count();
    assert!(remains > 1, "the gate and the directory of the dead build");
    // Another signing key, so another lock: everything else is the same.
    fixture.update = true;
    let built = fixture.build(false).unwrap();
    assert_no_remains(&fixture);
    assert_same(&built, &Fixture::new().build(false).unwrap());
}

#[test]
#[ignore = "the child of a_full_disk_is_named_and_leaves_nothing_half_finished"]
fn a_build_without_room() {
    let Some(directory) = given_directory() else {
        return;
    };
    let fixture = Fixture::in_directory(directory);
    let clean = Fixture::new();
    clean.build(false).unwrap();
    let (mut refused, clean) = (Vec::new(), finished_files(&clean));
    // A limit on the length of each file; the last one is none. What fits stays, what does not must leave nothing.
    for limit in [1, 200, 500, 3_000, 10_000, 30_000]
        .map(Some)
        .into_iter()
        .chain([None])
    {
        limit_files(limit);
        let result = fixture.build(false);
        for (path, content) in finished_files(&fixture) {
            assert!(clean.get(&path) == Some(&content), "half of {}", path.display());
        }
        match result {
            Ok(_) => {
                assert_eq!(finished_files(&fixture).len(), clean.len());
                let at = |part: &str| refused.iter().any(|text: &String| text.contains(part));
                for part in ["seen", "keep package", "save the lock", "mkfs.erofs"] {
                    assert!(at(part), "no limit met {part}: {refused:?}");
                }
                println!("refused {} times, then built", refused.len());
            }
            Err(Error::NoRoom { cache, source }) => {
                assert_eq!(cache, fixture.cache());
                refused.push(source.to_string());
            }
            Err(error) => panic!("{limit:?}: {error:?}"),
        }
        assert_no_remains(&fixture);
    }
}

/// Everything with a final name whose content is the same in every cache.
fn finished_files(fixture: &Fixture) -> BTreeMap<PathBuf, Vec<u8>> {
    let fixed = |path: &Path| path.extension().is_none_or(|name| name != "seal");
    ["images", "indexes", "kernels", "packages", "seen"]
        .iter()
        .flat_map(|directory| files_below(&fixture.cache().join(directory)))
        .filter(|(path, _)| fixed(path))
        .map(|(path, content)| (path.strip_prefix(fixture.cache()).unwrap().to_owned(), content))
        .collect()
}

/// No file may grow longer than `limit` bytes, by this process and its children.
fn limit_files(limit: Option<u64>) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Fsize).maximum;
    let current = limit.or(maximum);
    setrlimit(Resource::Fsize, Rlimit { current, maximum }).unwrap();
}

#[test]
fn a_full_disk_is_named_and_leaves_nothing_half_finished() {
    let outside = tempfile::tempdir().unwrap();
    // An ignored signal stays ignored over exec; writes beyond the limit then fail like those to a full disk.
    let ignoring = ["sh", "-c", "trap '' XFSZ; exec \"$0\" \"$@\""];
    let output = child("a_build_without_room", outside.path(), &ignoring)
        .wait_with_output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("times, then built"),
        "{text}"
    );
}

#[test]
fn damaged_results_are_told_and_made_anew() {
    let fixture = Fixture::new();
    let first = fixture.build(false).unwrap();
    let good = bytes(&first);
    let kernel = first.kernel.parent().unwrap();
    let files = [
        &first.root,
        &first.agent_disk,
        &first.initramfs,
        &first.kernel,
        &kernel.join("modules.tar"),
    ];
    fixture.server.files.lock().unwrap().clear();
    for path in files {
        let content = fs::read(path).unwrap();
        let cut = content[..content.len() / 2].to_vec();
        let mut flipped = content;
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        for damage in [cut, flipped] {
            fs::write(path, damage).unwrap();
            // The modules are only looked at when something is made of them.
            fs::remove_file(&first.agent_disk).unwrap();
            let again = fixture.build(true).unwrap();
            assert!(again.built && bytes(&again) == good, "{}", path.display());
            let told = fixture.warnings.take().join("\n");
            let missing = *path == first.agent_disk;
            assert!(
                missing || told.contains(&format!("{} is damaged", path.display())),
                "{told}"
            );
        }
    }
    fs::write(&first.agent_disk, "damaged").unwrap();
    assert!(bytes(&fixture.build(true).unwrap()) == good);
    assert!(
        fixture
            .warnings
            .take()
            .join("")
            .contains(&first.agent_disk.display().to_string())
    );
}

#[test]
fn damaged_packages_are_fetched_again_and_named_when_they_cannot_be() {
    let fixture = Fixture::new();
    let first = fixture.build(false).unwrap();
    let good = bytes(&first);
    let lock = fixture.own_lock();
    let packages = Lock::load(&lock).unwrap().unwrap().packages;
    let path = |name: &str| fixture.cache().join("packages").join(&packages[name].sha256);
    let damage = || {
        for name in ["libpq5", "zlib1g", "linux-image-6-cloud-amd64"] {
            let mut bytes = fs::read(path(name)).unwrap();
            bytes[100] ^= 1;
            fs::write(path(name), bytes).unwrap();
        }
        for directory in ["images", "kernels"] {
            fs::remove_dir_all(fixture.cache().join(directory)).unwrap();
        }
    };
    damage();
    let again = fixture.build(true).unwrap();
    assert!(bytes(&again) == good);
    let told = fixture.warnings.take().join("\n");
    for name in ["libpq5", "zlib1g", "linux-image-6-cloud-amd64"] {
        assert!(told.contains(&path(name).display().to_string()), "{told}");
    }

    damage();
    fixture.server.files.lock().unwrap().clear();
    let error = fixture.build(true).unwrap_err();
    assert!(matches!(error, Error::Download(_)), "{error}");
    assert!(
        fixture
            .warnings
            .take()
            .join("")
            .contains(&path("libpq5").display().to_string())
    );
}

#[test]
fn missing_and_damaged_manifests_and_indexes_are_made_anew() {
    let fixture = Fixture::new();
    let first = fixture.build(false).unwrap();
    for directory in ["manifests", "indexes", "seen"] {
        for path in files_below(&fixture.cache().join(directory)).keys() {
            fs::write(path, "damaged").unwrap();
        }
    }
    fs::remove_file(fixture.own_lock()).unwrap();
    let again = fixture.build(false).unwrap();
    assert!(again.built);
    assert_same(&first, &again);
}
