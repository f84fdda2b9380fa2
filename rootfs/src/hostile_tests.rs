//! Foreign bytes in every parser of this crate: a value or a typed error, never a panic, and nothing beyond the limits.

use std::{cmp::Ordering, path::Path, sync::LazyLock};

use proptest::{collection::vec, prelude::*};
use sovereign_kernel::testing::damaged;

use crate::{
    Arch, Archive,
    deb::{self, read_tar},
    digest::is_sha256,
    index::{Index, dependency_names, is_plain_path},
    lock::{Lock, resolve},
    needed::needed,
    recipe::Recipe,
    release::Release,
    testing::{NOW, Signer, TarEntry, deb as package, xz},
    tree::{Node, Tree},
    version,
};

/// Some places of damage.
fn edits() -> impl Strategy<Value = Vec<(u32, u8, u8)>> {
    vec(any::<(u32, u8, u8)>(), 1..8)
}

/// Whether every entry of a tree lies inside it, below directories.
fn is_sound(tree: &Tree) -> bool {
    tree.iter().all(|(path, _)| {
        let parents = path.match_indices('/').map(|(at, _)| &path[..at]);
        let mut parents = parents.map(|parent| matches!(tree.get(parent), Some(Node::Directory { .. })));
        is_inside(path) && parents.all(|directory| directory)
    })
}

fn is_inside(path: &str) -> bool {
    !path.is_empty() && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fn entries() -> Vec<TarEntry> {
    vec![
        TarEntry::directory("./usr/"),
        TarEntry::file("./usr/a", b"text of a file"),
        TarEntry::link("./usr/l", "../../etc/x"),
        TarEntry::hard_link("./usr/h", "./usr/a"),
        TarEntry::file("./usr/lib/b", &[7; 700]),
    ]
}

/// The tar inside a test package.
fn tar() -> Vec<u8> {
    let package = package(&entries());
    let at = package.windows(6).position(|part| part == b"./usr/").unwrap();
    package[at..].to_vec()
}

proptest! {
    #[test]
    fn damaged_packages_are_sound_trees_or_refused(edits in edits(), noise in vec(any::<u8>(), 0..200)) {
        if let Ok(tree) = deb::read(&damaged(&package(&entries()), &edits)) {
            prop_assert!(is_sound(&tree));
        }
        let _ = deb::read(&noise);
        let _ = deb::read(&[b"!<arch>\n".as_slice(), &noise].concat());
    }

    #[test]
    fn damaged_tars_are_sound_trees_or_refused(edits in edits(), kind in any::<u8>(), noise in vec(any::<u8>(), 0..600)) {
        let mut bytes = damaged(&tar(), &edits);
        for bytes in [&bytes.clone(), &noise] {
            if let Ok(tree) = read_tar(bytes) {
                prop_assert!(is_sound(&tree));
            }
        }
        // Damage would mostly end at the checksum of a header: mend those, and try every kind of entry.
        for header in bytes.chunks_exact_mut(512) {
            if header[257..262] == *b"ustar" {
                if kind % 3 == 0 {
                    header[156] = kind;
                }
                header[148..156].fill(b' ');
                let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
                header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        if let Ok(tree) = read_tar(&bytes) {
            prop_assert!(is_sound(&tree));
        }
    }

    #[test]
    fn a_compressed_member_may_hold_anything(edits in edits(), inner in any::<bool>()) {
        let good = tar();
        let packed = if inner { xz(&damaged(&good, &edits)) } else { damaged(&xz(&good), &edits) };
        let header = format!("{:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", "data.tar.xz", 0, 0, 0, 100_644, packed.len());
        let bytes = [b"!<arch>\n", header.as_bytes(), &packed].concat();
        if let Ok(tree) = deb::read(&bytes) {
            prop_assert!(is_sound(&tree));
        }
    }

    #[test]
    fn any_sequence_of_entries_keeps_a_tree_sound(steps in vec((0..5_u8, "[ab./]{0,8}", "[ab./]{0,8}"), 0..24)) {
        let mut tree = Tree::default();
        for (kind, path, target) in &steps {
            let _ = match kind {
                0 => tree.directory(path, 0o777),
                1 => tree.file(path, 0o644, *b"x"),
                2 => tree.link(path, target),
                3 => tree.hard_link(path, target),
                _ => {
                    tree.prune(|path| path.contains(target.as_str()));
                    Ok(())
                }
            };
            prop_assert!(is_sound(&tree), "{steps:?}");
            if let Some(found) = tree.resolve(path) {
                prop_assert!(found.is_empty() || is_inside(&found), "{found:?}");
            }
        }
    }

    #[test]
    fn an_index_offers_only_plain_paths_with_digests(
        stanzas in vec("((Package|Version|Architecture|Filename|Size|SHA256|Depends|X): ?[a-f0-9./ ,|()~+:-]{0,70}\n){0,8}", 0..4),
        edits in edits(),
        noise in ".{0,200}",
    ) {
        let good = format!("Package: a\nVersion: 1\nArchitecture: amd64\nFilename: pool/a\nSize: 5\nSHA256: {}\nDepends: b | c, d\n", "0".repeat(64));
        let mended = String::from_utf8_lossy(&damaged(good.as_bytes(), &edits)).into_owned();
        let text = [stanzas.join("\n"), mended, noise].join("\n\n");
        let mut index = Index::default();
        index.add(Archive::Main, Arch::Amd64, &text);
        for name in ["a", "b", "", "0"] {
            if let Some(offer) = index.get(name) {
                prop_assert!(is_sha256(&offer.sha256) && is_plain_path(&offer.path), "{offer:?}");
                prop_assert!(dependency_names(&offer.depends).all(|name| !name.is_empty()));
            }
        }
        prop_assert!(resolve(&index, &Recipe::named("postgresql-17").unwrap(), Arch::Amd64).is_err());
    }

    #[test]
    fn a_release_vouches_for_digests_only(edits in edits(), noise in ".{0,200}") {
        let good = format!(
            "Codename: trixie\nDate: Thu, 12 Nov 2026 00:00:00 UTC\nValid-Until: Fri, 27 Nov 2026 00:12:42 UTC\nSHA256:\n {} 7 main/a\n",
            "ab".repeat(32)
        );
        let text = String::from_utf8_lossy(&damaged(good.as_bytes(), &edits)).into_owned();
        for text in [text, format!("Codename: trixie\nDate: {noise}\nSHA256:\n {noise}")] {
            if let Ok(release) = Release::parse("trixie", &text, NOW - 1_000_000, None)
                && let Ok(vouched) = release.file("trixie", "main/a")
            {
                prop_assert!(is_sha256(&vouched.sha256));
            }
        }
    }

    #[test]
    fn a_damaged_lock_is_refused_or_names_digests_only(edits in edits(), noise in ".{0,100}") {
        let text = String::from_utf8_lossy(&damaged(LOCK.as_bytes(), &edits)).into_owned();
        prop_assert!(Lock::parse(LOCK, Path::new("l")).is_ok());
        let _ = Lock::parse(&noise, Path::new("l"));
        if let Ok(lock) = Lock::parse(&text, Path::new("l")) {
            let odd = lock.packages.values().find(|package| !is_sha256(&package.sha256) || !is_plain_path(&package.path));
            prop_assert!(odd.is_none() && lock.packages.contains_key(&lock.kernel), "{odd:?}");
        }
    }

    #[test]
    fn damaged_programs_need_something_or_are_refused(edits in edits(), front in any::<bool>()) {
        let good = &*SHELL;
        prop_assert!(!needed(good).unwrap().is_empty());
        // The headers are a small part of the file.
        let bytes = if front {
            [damaged(&good[..1024], &edits), good[1024..].to_vec()].concat()
        } else {
            damaged(good, &edits)
        };
        if let Ok(names) = needed(&bytes) {
            prop_assert!(names.iter().all(|name| name.len() <= 3 * 255));
        }
    }

    #[test]
    fn versions_have_one_order(left in "[0-9a-z.~:+-]{0,12}", right in "[0-9a-z.~:+-]{0,12}", noise in ".{0,12}") {
        prop_assert_eq!(version::compare(&left, &left), Ordering::Equal);
        prop_assert_eq!(version::compare(&left, &right), version::compare(&right, &left).reverse());
        prop_assert_eq!(version::compare(&noise, &right), version::compare(&right, &noise).reverse());
    }
}

proptest! {
    // Signatures are dear without optimisation.
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_damaged_signed_text_is_the_signed_text_or_refused(edits in edits(), noise in ".{0,200}") {
        let signed = &SIGNED.1;
        let keyring = SIGNED.0.keyring();
        let verify = |bytes: &[u8]| keyring.verify(Archive::Main, "x", bytes, SIGNED.0.now());
        let whole = verify(signed).unwrap();
        prop_assert_eq!(whole.trim_end(), TEXT.trim_end());
        // Anywhere, and in the text alone: damage elsewhere mostly ends in the armour.
        let start = signed.windows(9).position(|part| part == b"Codename:").unwrap();
        let end = start + TEXT.len();
        let text_only = [&signed[..start], &damaged(&signed[start..end], &edits), &signed[end..]].concat();
        for bytes in [damaged(signed, &edits), text_only] {
            if let Ok(text) = verify(&bytes) {
                prop_assert_eq!(text.trim_end(), TEXT.trim_end());
            }
        }
        let _ = verify(noise.as_bytes());
        let _ = verify(format!("-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n{noise}\n-----BEGIN PGP SIGNATURE-----\n\n{noise}\n-----END PGP SIGNATURE-----\n").as_bytes());
    }
}

const TEXT: &str = "Codename: trixie\n- dashed\nSHA256:\n 00 1 a\n";

static SIGNED: LazyLock<(Signer, Vec<u8>)> = LazyLock::new(|| {
    let signer = Signer::subkey();
    let signed = signer.sign(TEXT);
    (signer, signed)
});

/// A dynamic program that every machine has.
static SHELL: LazyLock<Vec<u8>> = LazyLock::new(|| std::fs::read("/bin/sh").unwrap());

const LOCK: &str = r#"format = 1
suite = "trixie"
arch = "amd64"
kernel = "linux-image-6"

[packages.linux-image-6]
version = "6.1-1"
arch = "amd64"
archive = "main"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
sha1 = "0000000000000000000000000000000000000000"
size = 5
path = "pool/l.deb"
"#;
