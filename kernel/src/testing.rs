//! For tests: the smallest ELF files that depmod, modprobe and this crate read as kernel modules, and damage.

/// What a module is made of.
#[derive(Debug, Clone, Copy, Default)]
pub struct Module<'a> {
    /// Entries of `.modinfo`, each with its closing NUL.
    pub modinfo: &'a str,
    /// Symbols it exports.
    pub exports: &'a [&'a str],
    /// Symbols of other modules it needs.
    pub needs: &'a [&'a str],
}

const SECTIONS: [&str; 6] = [
    "",
    ".modinfo",
    "__ksymtab_strings",
    ".symtab",
    ".strtab",
    ".shstrtab",
];
const HEADER: usize = 64;
const SYMBOL: usize = 24;

impl Module<'_> {
    /// The module as a relocatable ELF64 file, little-endian, of machine x86-64.
    #[must_use]
    pub fn elf(&self) -> Vec<u8> {
        let (symbols, strings) = self.symbols();
        let exports: String = self.exports.iter().map(|name| format!("{name}\0")).collect();
        let names: String = SECTIONS.iter().map(|name| format!("{name}\0")).collect();
        // Kind of section, content, link, entry size.
        let sections: [(u32, &[u8], u32, u64); 5] = [
            (1, self.modinfo.as_bytes(), 0, 0),
            (1, exports.as_bytes(), 0, 0),
            (2, &symbols, 4, SYMBOL as u64),
            (3, strings.as_bytes(), 0, 0),
            (3, names.as_bytes(), 0, 0),
        ];
        let mut elf = vec![0_u8; HEADER];
        let mut headers = vec![0_u8; HEADER];
        for ((kind, content, link, entry), name) in sections.iter().zip(&SECTIONS[1..]) {
            elf.resize(elf.len().next_multiple_of(8), 0);
            let mut header = [0_u8; HEADER];
            let name_at = names.find(&format!("\0{name}\0")).map_or(0, |at| at + 1);
            put(&mut header, 0, &(name_at as u32).to_le_bytes());
            put(&mut header, 4, &kind.to_le_bytes());
            put(&mut header, 24, &(elf.len() as u64).to_le_bytes());
            put(&mut header, 32, &(content.len() as u64).to_le_bytes());
            put(&mut header, 40, &link.to_le_bytes());
            put(&mut header, 44, &1_u32.to_le_bytes());
            put(&mut header, 48, &1_u64.to_le_bytes());
            put(&mut header, 56, &entry.to_le_bytes());
            elf.extend_from_slice(content);
            headers.extend(header);
        }
        elf.resize(elf.len().next_multiple_of(8), 0);
        let headers_at = elf.len() as u64;
        put(&mut elf, 0, b"\x7fELF\x02\x01\x01");
        put(&mut elf, 16, &[1, 0, 62, 0, 1]); // relocatable, x86-64, version 1
        put(&mut elf, 40, &headers_at.to_le_bytes());
        // Sizes of this header and of a section header, number of sections, which one has the names.
        for (at, value) in [
            (52, HEADER),
            (58, HEADER),
            (60, SECTIONS.len()),
            (62, SECTIONS.len() - 1),
        ] {
            put(&mut elf, at, &(value as u16).to_le_bytes());
        }
        elf.extend(headers);
        elf
    }

    /// `.symtab` and `.strtab`: a checksum symbol for each export, an undefined one for each need.
    fn symbols(&self) -> (Vec<u8>, String) {
        let checksums = self
            .exports
            .iter()
            .map(|name| (format!("__crc_{name}"), 0x10_u8, 0xfff1_u16));
        let needs = self.needs.iter().map(|name| ((*name).to_owned(), 0x10, 0));
        let (mut table, mut strings) = (vec![0_u8; SYMBOL], "\0".to_owned());
        for (name, info, section) in checksums.chain(needs) {
            let mut symbol = [0_u8; SYMBOL];
            put(&mut symbol, 0, &(strings.len() as u32).to_le_bytes());
            symbol[4] = info;
            put(&mut symbol, 6, &section.to_le_bytes());
            table.extend(symbol);
            strings.push_str(&name);
            strings.push('\0');
        }
        (table, strings)
    }
}

fn put(target: &mut [u8], at: usize, bytes: &[u8]) {
    target[at..at + bytes.len()].copy_from_slice(bytes);
}

/// `good` with each edit applied in turn: where (as a share of 2^32), what and with which byte. Nearly good data get
/// further into a parser than noise.
#[must_use]
pub fn damaged(good: &[u8], edits: &[(u32, u8, u8)]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for (place, kind, byte) in edits {
        let at = ((u64::from(*place) * bytes.len() as u64) >> 32) as usize;
        let end = (at + usize::from(*byte)).min(bytes.len());
        match kind % 8 {
            // Most damage is a changed byte; some of the changes are to values at which lengths overflow.
            0..=2 if at < bytes.len() => bytes[at] = *byte,
            3 if at < bytes.len() => bytes[at] ^= 1 << (byte % 8),
            4 if at < bytes.len() => bytes[at..end].fill(if byte % 2 == 0 { 0xff } else { b'9' }),
            5 => bytes.insert(at, *byte),
            6 => drop(bytes.drain(at..end)),
            7 if byte % 8 == 0 => bytes.truncate(at),
            7 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            _ => {}
        }
    }
    bytes
}
