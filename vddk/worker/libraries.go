package worker

import (
	"bufio"
	"debug/elf"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxLibraries limits the number of libraries that MissingLibraries examines. VDDK needs about
// sixty.
const maxLibraries = 1000

// MissingLibraries returns the names of the libraries that the library at path needs, directly or
// through other libraries, and that are not installed. The dynamic linker itself reports only the
// first missing one.
//
// Like the linker, MissingLibraries searches the folders that ld.so(8) lists: those of DT_RUNPATH
// or DT_RPATH in the library, the folder dir, those of /etc/ld.so.conf, and the default folders.
// dir stands for LD_LIBRARY_PATH, because worker processes have this folder in that variable. If
// MissingLibraries cannot read a library, it assumes that this library needs no other ones.
func MissingLibraries(path, dir string) []string {
	system := append(systemFolders("/etc/ld.so.conf", 0), "/lib64", "/usr/lib64", "/lib", "/usr/lib",
		"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu")
	var missing []string
	seen := map[string]bool{filepath.Base(path): true}
	queue := []string{path}
	for len(queue) > 0 && len(seen) < maxLibraries {
		file := queue[0]
		queue = queue[1:]
		needed, folders := neededLibraries(file)
		if dir != "" {
			folders = append(folders, dir)
		}
		folders = append(folders, system...)
		for _, name := range needed {
			if seen[name] {
				continue
			}
			seen[name] = true
			if found := findLibrary(name, folders); found != "" {
				queue = append(queue, found)
			} else {
				missing = append(missing, name)
			}
		}
	}
	slices.Sort(missing)
	return missing
}

// neededLibraries reads the library at path. It returns the names of the libraries that this
// library needs directly. It also returns the folders in DT_RUNPATH or DT_RPATH of this library, in
// which the needed libraries may be.
func neededLibraries(path string) (needed, folders []string) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, nil
	}
	defer f.Close()
	needed, _ = f.ImportedLibraries()
	paths, _ := f.DynString(elf.DT_RUNPATH)
	if len(paths) == 0 {
		paths, _ = f.DynString(elf.DT_RPATH)
	}
	origin := filepath.Dir(path)
	for _, list := range paths {
		for _, folder := range strings.Split(list, ":") {
			folder = strings.NewReplacer("${ORIGIN}", origin, "$ORIGIN", origin).Replace(folder)
			if folder != "" {
				folders = append(folders, folder)
			}
		}
	}
	return needed, folders
}

// findLibrary searches the folders for an x86-64 library with the given name. It returns the
// path of the first one, or "" if there is none.
func findLibrary(name string, folders []string) string {
	if strings.Contains(name, "/") {
		folders = []string{""}
	}
	for _, folder := range folders {
		path := filepath.Join(folder, name)
		f, err := elf.Open(path)
		if err != nil {
			continue
		}
		fits := f.Machine == elf.EM_X86_64
		f.Close()
		if fits {
			return path
		}
	}
	return ""
}

// systemFolders returns the folders that the file at path lists. The file has the format of
// /etc/ld.so.conf and may include other files. depth is 0 for the first file and 1 more for each
// level of inclusion.
func systemFolders(path string, depth int) []string {
	f, err := os.Open(path)
	if err != nil || depth > 4 {
		return nil
	}
	defer f.Close()
	var folders []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line, _, _ := strings.Cut(lines.Text(), "#")
		line = strings.TrimSpace(line)
		if pattern, ok := strings.CutPrefix(line, "include"); ok {
			pattern = strings.TrimSpace(pattern)
			if !filepath.IsAbs(pattern) {
				pattern = filepath.Join(filepath.Dir(path), pattern)
			}
			files, _ := filepath.Glob(pattern)
			for _, file := range files {
				folders = append(folders, systemFolders(file, depth+1)...)
			}
		} else if strings.HasPrefix(line, "/") {
			folders = append(folders, line)
		}
	}
	return folders
}
