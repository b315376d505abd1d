package vddk

import (
	"debug/elf"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// LibDirs are the places where FindLibrary looks for the distribution when it
// is told none, the best first.
var LibDirs = []string{
	"/usr/lib/vmware-vix-disklib",
	"/usr/lib64/vmware-vix-disklib",
	"/opt/vmware-vix-disklib-distrib",
	"/opt/openvddk",
}

// Versions of the library, by the number in its file's name. The oldest one has
// the synchronous calls only, so any newer one in a place is taken before it.
var (
	versions      = []int{9, 8, 7, 6}
	oldestVersion = 5
)

const libraryName = "libvixDiskLib.so"

// LibraryError says that no library was found that could be loaded.
type LibraryError struct {
	Searched []string          // each folder or file that was looked at, in order
	Unusable map[string]string // files that are there, and why they are of no use
	missing  string            // the one place asked for, which is not there
}

func (e *LibraryError) Error() string {
	var s strings.Builder
	s.WriteString("no VDDK library found")
	if e.missing != "" {
		return s.String() + ": " + e.missing + ": no such file or folder"
	}
	for _, path := range slices.Sorted(maps.Keys(e.Unusable)) {
		fmt.Fprintf(&s, "; %s: %s", path, e.Unusable[path])
	}
	fmt.Fprintf(&s, "; looked for %s.%d to .%d in %s", libraryName, oldestVersion, versions[0], strings.Join(e.Searched, ", "))
	return s.String()
}

// Hint says how to get one.
func (e *LibraryError) Hint() string {
	return "VDDK is VMware's (a tar file: unpack it and name its folder with --libdir); OpenVDDK, which is free, is found in /opt/openvddk"
}

// FindLibrary returns the newest library in libdir, which may be the root of
// the distribution, its lib64, or the library itself; or, where libdir is
// empty, in the first of LibDirs that has one. It loads nothing. What is no
// library for this machine is passed over. The error is a *LibraryError.
func FindLibrary(libdir string) (Library, error) {
	roots := LibDirs
	failed := &LibraryError{Unusable: map[string]string{}}
	if libdir != "" {
		abs, err := filepath.Abs(libdir)
		if err != nil {
			return Library{}, err
		}
		fi, err := os.Stat(abs)
		if err != nil {
			failed.missing = libdir
			if !errors.Is(err, os.ErrNotExist) {
				failed.missing, failed.Unusable[abs], failed.Searched = "", reason(err), []string{abs}
			}
			return Library{}, failed
		}
		if !fi.IsDir() {
			failed.Searched = []string{abs}
			l, err := library(abs)
			if err != nil {
				failed.Unusable[abs] = reason(err)
				return Library{}, failed
			}
			return l, nil
		}
		roots = []string{abs}
	}
	for _, root := range roots {
		folders := []string{filepath.Join(root, "lib64"), root}
		failed.Searched = append(failed.Searched, folders...)
		for _, numbers := range [][]int{versions, {oldestVersion}} {
			for _, folder := range folders {
				for _, n := range numbers {
					path := filepath.Join(folder, fmt.Sprintf("%s.%d", libraryName, n))
					l, err := library(path)
					if err == nil {
						return l, nil
					}
					// A link that leads nowhere is there, other files are not.
					if _, statErr := os.Lstat(path); statErr == nil {
						failed.Unusable[path] = reason(err)
					}
				}
			}
		}
	}
	return Library{}, failed
}

// reason is err without the path that who prints it names anyway.
func reason(err error) string {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err.Error()
	}
	return err.Error()
}

// library looks at the file at path, which is absolute.
func library(path string) (Library, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return Library{}, err
	}
	f, err := openELF(real)
	if err != nil {
		return Library{}, err
	}
	defer f.Close()
	l := Library{Path: real, Dir: filepath.Dir(real)}
	l.Root = l.Dir
	if filepath.Base(l.Dir) == "lib64" {
		l.Root = filepath.Dir(l.Dir)
	}
	// What the library calls itself is worth more than what it is called.
	names := []string{filepath.Base(path), filepath.Base(real)}
	if soname, err := f.DynString(elf.DT_SONAME); err == nil {
		names = append(soname, names...)
	}
	for _, name := range names {
		if m := versioned.FindStringSubmatch(name); m != nil {
			l.Version, err = strconv.Atoi(m[1])
			if err != nil || l.Version < oldestVersion {
				return Library{}, fmt.Errorf("it is version %s, want %d or later", m[1], oldestVersion)
			}
			return l, nil
		}
	}
	return Library{}, fmt.Errorf("neither its name nor its SONAME is %s.N", libraryName)
}

var versioned = regexp.MustCompile(`^libvixDiskLib\.so\.([0-9]+)(\.|$)`)

// openELF opens a shared library of the kind that the worker can load.
func openELF(path string) (*elf.File, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() { // opening a FIFO would wait
		return nil, errors.New("it is no regular file")
	}
	f, err := elf.Open(path)
	if err != nil {
		if errors.As(err, new(*os.PathError)) {
			return nil, err
		}
		return nil, fmt.Errorf("it is no ELF file, or not all of one (%w)", err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 || f.Type != elf.ET_DYN {
		f.Close()
		return nil, fmt.Errorf("it is an ELF file for %s, %s, %s; want a shared library for 64-bit x86-64", f.Machine, f.Class, f.Type)
	}
	return f, nil
}

// Function is one that the library may have.
type Function struct {
	Name     string
	Present  bool
	Optional bool // a disk can be read without it
}

// Functions tells which of the functions of VDDK that matter here the library
// has, from its table of symbols: it is not loaded.
func Functions(l Library) ([]Function, error) {
	f, err := openELF(l.Path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.Path, err)
	}
	defer f.Close()
	symbols, err := f.DynamicSymbols()
	if err != nil && !errors.Is(err, elf.ErrNoSymbols) {
		return nil, fmt.Errorf("%s: the table of symbols: %w", l.Path, err)
	}
	exported := map[string]bool{}
	for _, s := range symbols {
		if s.Section != elf.SHN_UNDEF {
			exported[s.Name] = true
		}
	}
	list := slices.Clone(functions)
	for i := range list {
		list[i].Present = exported[list[i].Name]
	}
	return list, nil
}

// functions of VDDK's interface that are looked for.
var functions = []Function{
	{Name: "VixDiskLib_InitEx"},
	{Name: "VixDiskLib_Exit"},
	{Name: "VixDiskLib_GetErrorText"},
	{Name: "VixDiskLib_FreeErrorText"},
	{Name: "VixDiskLib_AllocateConnectParams", Optional: true},
	{Name: "VixDiskLib_FreeConnectParams", Optional: true},
	{Name: "VixDiskLib_ConnectEx"},
	{Name: "VixDiskLib_Open"},
	{Name: "VixDiskLib_Close"},
	{Name: "VixDiskLib_Disconnect"},
	{Name: "VixDiskLib_GetTransportMode"},
	{Name: "VixDiskLib_ListTransportModes", Optional: true},
	{Name: "VixDiskLib_GetInfo"},
	{Name: "VixDiskLib_FreeInfo"},
	{Name: "VixDiskLib_Read"},
	{Name: "VixDiskLib_Write", Optional: true},
	{Name: "VixDiskLib_ReadAsync", Optional: true},
	{Name: "VixDiskLib_WriteAsync", Optional: true},
	{Name: "VixDiskLib_Wait", Optional: true},
	{Name: "VixDiskLib_Flush", Optional: true},
	{Name: "VixDiskLib_ReadMetadata", Optional: true},
	{Name: "VixDiskLib_GetMetadataKeys", Optional: true},
	{Name: "VixDiskLib_PrepareForAccess", Optional: true},
	{Name: "VixDiskLib_EndAccess", Optional: true},
	{Name: "VixDiskLib_Cleanup", Optional: true},
	{Name: "VixDiskLib_Create", Optional: true},
	{Name: "VixDiskLib_CheckRepair", Optional: true},
	{Name: "VixDiskLib_QueryAllocatedBlocks", Optional: true},
	{Name: "VixDiskLib_FreeBlockList", Optional: true},
}

// maxDependencies bounds how many libraries Missing looks at.
const maxDependencies = 512

// Missing names the libraries that the library needs, itself or through others,
// and that are found neither in its folder nor where the system's loader looks.
// It is for explaining a library that does not load, not for refusing one: a
// loader may have places of its own.
func Missing(l Library) ([]string, error) {
	dirs := append([]string{l.Dir}, systemLibDirs()...)
	var missing []string
	seen := map[string]bool{}
	queue := []string{l.Path}
	for len(queue) > 0 && len(seen) < maxDependencies {
		path := queue[0]
		queue = queue[1:]
		needed, own, err := dependencies(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		for _, name := range needed {
			if seen[name] {
				continue
			}
			seen[name] = true
			found := ""
			for _, dir := range slices.Concat(own, dirs) {
				candidate := filepath.Join(dir, name)
				if strings.Contains(name, "/") {
					candidate = name
				}
				if f, err := openELF(candidate); err == nil {
					f.Close()
					found = candidate
					break
				}
			}
			if found == "" {
				missing = append(missing, name)
			} else {
				queue = append(queue, found)
			}
		}
	}
	slices.Sort(missing)
	return missing, nil
}

// dependencies are the names that a library needs, and the folders that it says
// to look in.
func dependencies(path string) (needed, dirs []string, err error) {
	f, err := openELF(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if needed, err = f.ImportedLibraries(); err != nil {
		return nil, nil, fmt.Errorf("what it needs: %w", err)
	}
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		lists, err := f.DynString(tag)
		if err != nil {
			continue // it is only where to look first
		}
		for _, list := range lists {
			for _, dir := range strings.Split(list, ":") {
				dir = strings.NewReplacer("$ORIGIN", filepath.Dir(path), "${ORIGIN}", filepath.Dir(path)).Replace(dir)
				if filepath.IsAbs(dir) {
					dirs = append(dirs, dir)
				}
			}
		}
	}
	return needed, dirs, nil
}

// systemLibDirs are the folders of the system's loader: its configuration's, and
// those that are built into the loaders of the distributions.
func systemLibDirs() []string {
	return append(loaderConfig("/etc/ld.so.conf", 0),
		"/lib64", "/usr/lib64", "/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib", "/usr/lib")
}

// loaderConfig reads a configuration file of the loader (ld.so.conf(5)).
func loaderConfig(path string, depth int) (dirs []string) {
	text, err := os.ReadFile(path)
	if err != nil || depth > 4 {
		return nil
	}
	for _, line := range strings.Split(string(text), "\n") {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0:
		case fields[0] == "include":
			for _, pattern := range fields[1:] {
				if !filepath.IsAbs(pattern) {
					pattern = filepath.Join(filepath.Dir(path), pattern)
				}
				names, _ := filepath.Glob(pattern)
				for _, name := range names {
					dirs = append(dirs, loaderConfig(name, depth+1)...)
				}
			}
		case filepath.IsAbs(fields[0]):
			dirs = append(dirs, fields[0])
		}
	}
	return dirs
}

// MissingError says that the library can't be loaded for what it needs.
type MissingError struct {
	Library string
	Names   []string // as Missing returns them
}

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s needs what is not installed: %s", e.Library, strings.Join(e.Names, ", "))
}

// Hint says what to do about it.
func (e *MissingError) Hint() string {
	for _, name := range e.Names {
		if name == "libssl.so.3" || name == "libcrypto.so.3" {
			return "VDDK 8.0.2 and later need OpenSSL 3, which older systems do not have: use VDDK 8.0.1, or a newer system"
		}
	}
	return "unpack the whole of VDDK with its symbolic links, or install the packages that have these"
}
