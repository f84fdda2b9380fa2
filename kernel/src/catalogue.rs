//! All modules of a kernel: in which order they load, and the files by which modprobe finds them.
//!
//! The files are those of depmod (kmod `tools/depmod.c`), without running it: the build needs no kmod on the host.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    module_index::{ModuleIndex, alias_key},
    module_info::ModuleInfo,
    modules::{BUILTIN, BUILTIN_INFO, ModuleError, ORDER, canonical_name, module_name, strip_compression},
};

/// Longest chain of modules of which each needs the next; in a Debian kernel it is about 10.
const DEPTH_MAX: usize = 64;

/// What is known about all modules of a kernel.
#[derive(Debug)]
pub struct Catalogue {
    /// In the order in which modprobe prefers them.
    modules: Vec<CatalogueModule>,
    by_name: BTreeMap<String, usize>,
    builtin: BTreeSet<String>,
    /// Alias and module of everything built in.
    builtin_aliases: Vec<(String, String)>,
}

#[derive(Debug)]
struct CatalogueModule {
    name: String,
    path: String,
    info: ModuleInfo,
}

impl Catalogue {
    pub(crate) fn new(
        modules: Vec<(String, String, ModuleInfo)>,
        text: impl Fn(&'static str) -> String,
    ) -> Self {
        let order = text(ORDER);
        let places: BTreeMap<&str, usize> = order
            .lines()
            .rev()
            .zip((0..order.lines().count()).rev())
            .collect();
        let mut modules: Vec<CatalogueModule> = modules
            .into_iter()
            .map(|(name, path, info)| CatalogueModule { name, path, info })
            .collect();
        modules.sort_by_key(|module| {
            let place = places.get(strip_compression(&module.path));
            place.copied().unwrap_or(usize::MAX)
        });
        let by_name = modules
            .iter()
            .enumerate()
            .map(|(at, module)| (module.name.clone(), at));
        Self {
            by_name: by_name.collect(),
            builtin: text(BUILTIN).lines().filter_map(module_name).collect(),
            builtin_aliases: builtin_aliases(&text(BUILTIN_INFO)),
            modules,
        }
    }

    /// The names of the `wanted` modules and of all they need, each after what it needs; built-in ones are skipped.
    ///
    /// # Errors
    /// When a wanted module or a hard dependency is neither a file nor built in, or modules need each other.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<&str>, ModuleError> {
        let mut walk = Walk::new(self, true);
        for name in wanted {
            walk.visit(&canonical_name(name), "the list of wanted modules")?;
        }
        Ok(walk
            .ready
            .into_iter()
            .map(|at| self.modules[at].name.as_str())
            .collect())
    }

    /// Names and contents of the index files that belong beside the modules.
    ///
    /// The text forms of aliases and symbols are left out, because nothing reads them; that of the dependencies is
    /// there for the guest agent.
    ///
    /// # Errors
    /// When modules need each other, or an index grows past its format.
    pub fn index_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, ModuleError> {
        let lines = self.dependency_lines()?;
        let mut dependencies = ModuleIndex::default();
        for ((at, module), line) in self.modules.iter().enumerate().zip(&lines) {
            dependencies.insert(&module.name, line, at);
        }
        let mut builtin = ModuleIndex::default();
        for name in &self.builtin {
            builtin.insert(name, "", 0);
        }
        let binary = |index: ModuleIndex| {
            index.bytes().ok_or(ModuleError::TooMany {
                count: self.modules.len(),
            })
        };
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        Ok(vec![
            ("modules.dep", text.into_bytes()),
            ("modules.dep.bin", binary(dependencies)?),
            ("modules.alias.bin", binary(self.aliases())?),
            ("modules.symbols.bin", binary(self.symbols())?),
            ("modules.softdep", self.softdeps().into_bytes()),
            ("modules.builtin.bin", binary(builtin)?),
            ("modules.builtin.alias.bin", binary(self.builtin_index())?),
        ])
    }

    /// `path: paths of all it needs`, what is needed first last. A dependency that is nowhere is left out, as depmod
    /// does: only the module that needs it is of no use.
    fn dependency_lines(&self) -> Result<Vec<String>, ModuleError> {
        let mut walk = Walk::new(self, false);
        for module in &self.modules {
            walk.visit(&module.name, "the kernel package")?;
        }
        let mut rank = vec![0; self.modules.len()];
        for (place, at) in walk.ready.iter().enumerate() {
            rank[*at] = place;
        }
        let line = |at: usize| {
            let mut needed = self.all_needed(at);
            needed.sort_by_key(|at| std::cmp::Reverse(rank[*at]));
            let paths = needed.iter().map(|at| format!(" {}", self.modules[*at].path));
            format!("{}:{}", self.modules[at].path, paths.collect::<String>())
        };
        Ok((0..self.modules.len()).map(line).collect())
    }

    /// Direct and indirect dependencies of a module.
    fn all_needed(&self, at: usize) -> Vec<usize> {
        let direct = |at: usize| {
            self.modules[at]
                .info
                .depends
                .iter()
                .filter_map(|name| self.by_name.get(name))
        };
        let (mut seen, mut todo) = (BTreeSet::from([at]), vec![at]);
        while let Some(next) = todo.pop() {
            todo.extend(direct(next).filter(|at| seen.insert(**at)));
        }
        seen.remove(&at);
        seen.into_iter().collect()
    }

    fn aliases(&self) -> ModuleIndex {
        let mut index = ModuleIndex::default();
        for (at, module) in self.modules.iter().enumerate() {
            for key in module.info.aliases.iter().filter_map(|alias| alias_key(alias)) {
                index.insert(&key, &module.name, at);
            }
        }
        index
    }

    /// By which module a symbol is exported; of several the last one, as in depmod.
    fn symbols(&self) -> ModuleIndex {
        let mut owners = BTreeMap::new();
        for (at, module) in self.modules.iter().enumerate() {
            owners.extend(
                module
                    .info
                    .exports
                    .iter()
                    .map(|symbol| (symbol, (at, &module.name))),
            );
        }
        let mut index = ModuleIndex::default();
        for (symbol, (at, name)) in owners {
            index.insert(&format!("symbol:{symbol}"), name, at);
        }
        index
    }

    fn builtin_index(&self) -> ModuleIndex {
        let mut index = ModuleIndex::default();
        for (alias, name) in &self.builtin_aliases {
            index.insert(alias, name, 0);
        }
        index
    }

    fn softdeps(&self) -> String {
        let lines = self.modules.iter().flat_map(|module| {
            let line = |text: &String| format!("softdep {} {text}\n", module.name);
            module
                .info
                .softdeps
                .iter()
                .filter(|text| !text.contains('\n'))
                .map(line)
        });
        lines.collect()
    }

    /// A soft dependency may name a crypto algorithm (`crc32c`), whose portable module is `<name>_generic`.
    fn soft(&self, name: &str) -> Option<String> {
        [name.to_owned(), format!("{name}_generic")]
            .into_iter()
            .find(|candidate| self.has(candidate))
    }

    fn has(&self, name: &str) -> bool {
        self.builtin.contains(name) || self.by_name.contains_key(name)
    }
}

/// The aliases in `modules.builtin.modinfo`: entries `module.key=value`, each with a closing NUL.
fn builtin_aliases(text: &str) -> Vec<(String, String)> {
    let entry = |entry: &str| {
        let (name, rest) = entry.split_once('.')?;
        let alias = rest.strip_prefix("alias=")?;
        Some((alias_key(alias)?, name.to_owned()))
    };
    text.split('\0').filter_map(entry).collect()
}

/// A walk over what modules need.
struct Walk<'a> {
    catalogue: &'a Catalogue,
    /// Whether something needed that is nowhere is an error, and soft dependencies count.
    strict: bool,
    ready: Vec<usize>,
    done: BTreeSet<usize>,
    open: BTreeSet<usize>,
}

impl<'a> Walk<'a> {
    fn new(catalogue: &'a Catalogue, strict: bool) -> Self {
        let (ready, done, open) = Default::default();
        Self {
            catalogue,
            strict,
            ready,
            done,
            open,
        }
    }

    fn visit(&mut self, name: &str, wanted_by: &str) -> Result<(), ModuleError> {
        let catalogue = self.catalogue;
        let Some(at) = catalogue.by_name.get(name).copied() else {
            return if catalogue.builtin.contains(name) || !self.strict {
                Ok(())
            } else {
                Err(ModuleError::NotFound {
                    name: name.to_owned(),
                    wanted_by: wanted_by.to_owned(),
                })
            };
        };
        if self.done.contains(&at) || (self.strict && catalogue.builtin.contains(name)) {
            return Ok(());
        }
        if self.open.len() >= DEPTH_MAX || !self.open.insert(at) {
            return Err(ModuleError::Circle {
                name: name.to_owned(),
            });
        }
        let info = &catalogue.modules[at].info;
        for dependency in &info.depends {
            self.visit(dependency, name)?;
        }
        let soft = if self.strict {
            info.soft_before()
        } else {
            Vec::new()
        };
        for found in soft.iter().filter_map(|name| catalogue.soft(name)) {
            let open = catalogue
                .by_name
                .get(&found)
                .is_some_and(|at| self.open.contains(at));
            if !open {
                self.visit(&found, name)?;
            }
        }
        self.open.remove(&at);
        self.done.insert(at);
        self.ready.push(at);
        Ok(())
    }
}

#[cfg(test)]
#[path = "catalogue_tests.rs"]
mod tests;
