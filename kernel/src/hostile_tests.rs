//! Foreign bytes in every parser of this crate: a value or a typed error, never a panic, and no more than was allowed.

use std::{io::Write as _, sync::Arc};

use proptest::{collection::vec, prelude::*};

use crate::{
    ModuleIndex, ModuleSet, decompress, missing,
    module_info::ModuleInfo,
    testing::{Module, damaged},
    vmlinux, xz,
};

/// Some places of damage.
fn edits() -> impl Strategy<Value = Vec<(u32, u8, u8)>> {
    vec(any::<(u32, u8, u8)>(), 1..8)
}

fn packed_xz(content: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::XzOptions::with_preset(0);
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(content).unwrap();
    writer.finish().unwrap()
}

fn packed_zstd(content: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(content, ruzstd::encoding::CompressionLevel::Fastest)
}

fn module() -> Vec<u8> {
    let modinfo = "depends=b,c-d\0alias=pci:v[0-9]*\0softdep=pre: x post: y\0alias=char-major-1-2\0";
    Module {
        modinfo,
        exports: &["one", "two"],
        needs: &["other"],
    }
    .elf()
}

/// Text that compresses, but not to nothing.
fn content() -> Vec<u8> {
    (0..500_u32)
        .flat_map(|at| format!("{} ", at.wrapping_mul(2_654_435_761)).into_bytes())
        .collect()
}

proptest! {
    #[test]
    fn damaged_compression_gives_no_more_than_allowed(edits in edits(), plain in any::<bool>(), max in 0..8_000_u64) {
        let good = if plain { packed_zstd(&content()) } else { packed_xz(&content()) };
        if let Ok(bytes) = decompress(&damaged(&good, &edits), max) {
            prop_assert!(bytes.len() as u64 <= max);
        }
    }

    #[test]
    fn what_the_framing_says_is_what_comes_out(edits in edits()) {
        let bytes = damaged(&packed_xz(&content()), &edits);
        if let (Some(needs), Ok(content)) = (xz::needs(&bytes), decompress(&bytes, 1 << 20)) {
            prop_assert_eq!(needs.unpacked, content.len() as u64);
        }
    }

    #[test]
    fn noise_with_a_magic_is_no_panic(magic in 0..4_usize, noise in vec(any::<u8>(), 0..300)) {
        let magics = [b"\xfd7zXZ\0\0\x01".as_slice(), b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"\x7fELF"];
        let bytes = [magics[magic], &noise].concat();
        let _ = decompress(&bytes, 60_000);
        let _ = vmlinux(&bytes);
        let _ = ModuleInfo::read(&bytes);
    }

    #[test]
    fn damaged_modules_are_read_or_refused(edits in edits()) {
        if let Ok(info) = ModuleInfo::read(&damaged(&module(), &edits)) {
            let longest = info.exports.iter().chain(&info.aliases).map(String::len).max();
            prop_assert!(longest.unwrap_or(0) <= 3 * 1024, "a lost byte becomes at most three");
        }
    }

    #[test]
    fn damaged_kernels_are_unpacked_or_refused(edits in edits()) {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x207] = 2;
        image[0x206] = 0x0f;
        let payload = packed_xz(b"\x7fELF and more");
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(&payload);
        prop_assert!(vmlinux(&image).is_ok());
        // The header is where the lengths are.
        let header: Vec<_> = edits.iter().map(|(place, kind, byte)| ((*place >> 2) + (1 << 28), *kind, *byte)).collect();
        for edits in [&edits, &header] {
            let _ = vmlinux(&damaged(&image, edits));
        }
    }

    #[test]
    fn a_set_of_odd_modules_and_lists_is_a_catalogue_or_an_error(
        edits in edits(),
        order in ".{0,80}",
        builtin in "(kernel/[a-z/.-]{0,20}(\\.ko)?\n){0,4}",
        info in "([a-z]{0,3}\\.?alias=[^\0]{0,12}\0){0,4}",
        depends in "[a-d,-]{0,8}",
        alias in "[^\0]{0,24}",
    ) {
        let modinfo = format!("depends={depends}\0alias={alias}\0");
        let good = Module { modinfo: &modinfo, exports: &["x"], needs: &[] }.elf();
        let file = |path: &str, bytes: &[u8]| (path.to_owned(), Arc::from(bytes));
        let texts = [
            file("modules.order", order.as_bytes()),
            file("modules.builtin", builtin.as_bytes()),
            file("modules.builtin.modinfo", info.as_bytes()),
        ];
        let whole = [file("kernel/a.ko", &good), file("kernel/b.ko", &module())];
        let catalogue = ModuleSet::new(whole.into_iter().chain(texts.clone())).catalogue().unwrap();
        let _ = catalogue.load_order(&["a", "b"]);
        let _ = catalogue.index_files();
        let odd = [file("kernel/a.ko", &damaged(&good, &edits))];
        if let Ok(catalogue) = ModuleSet::new(odd.into_iter().chain(texts)).catalogue() {
            let _ = catalogue.index_files();
        }
    }

    #[test]
    fn any_entries_make_an_index(entries in vec((".{0,12}", "[a-z]{0,4}", 0..5_usize), 0..20)) {
        let mut index = ModuleIndex::default();
        for (key, value, priority) in &entries {
            index.insert(key, value, *priority);
        }
        prop_assert!(index.bytes().is_some());
    }

    #[test]
    fn any_text_is_a_kernel_config(text in ".{0,200}") {
        prop_assert!(!missing(&text).is_empty());
    }
}
