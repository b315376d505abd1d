package worker

import (
	"bufio"
	"debug/elf"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxLibraries limits the number of libraries that are examined. VDDK needs about sixty.
const maxLibraries = 1000

// MissingLibraries returns the names of all libraries that the library at path needs, directly
// or through others, and that the dynamic linker would not find. The linker itself names only
// the first one. MissingLibraries searches the folders that ld.so(8) lists: DT_RUNPATH or
// DT_RPATH, dir (which is in LD_LIBRARY_PATH), the folders of /etc/ld.so.conf, and the default
// folders. It assumes that a library that cannot be read needs no others.
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

// neededLibraries returns the names of the libraries that the library at path needs itself, and
// the folders in which it asks to search for them.
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

// findLibrary returns the path of an x86-64 library in one of the folders, or "".
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

// systemFolders returns the folders that a file in the format of ld.so.conf lists. depth is the
// number of files that include this one.
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
