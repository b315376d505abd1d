package vddk

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/vddkcp/vddkcp/vddk/worker"
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
	missing  string            // the one place asked for, which is not there, and why not
	hint     string            // instead of the general one; "": none
}

func (e *LibraryError) Error() string {
	var s strings.Builder
	s.WriteString("no VDDK library found")
	if e.missing != "" {
		return s.String() + ": " + e.missing
	}
	for _, path := range slices.Sorted(maps.Keys(e.Unusable)) {
		fmt.Fprintf(&s, "; %s: %s", path, e.Unusable[path])
	}
	fmt.Fprintf(&s, "; looked for %s.%d to .%d in %s", libraryName, oldestVersion, versions[0], strings.Join(e.Searched, ", "))
	return s.String()
}

// Hint says how to get one.
func (e *LibraryError) Hint() string {
	if e.hint != "" {
		return e.hint
	}
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
			switch to, linkErr := os.Readlink(abs); {
			case !errors.Is(err, os.ErrNotExist):
				failed.Unusable[abs], failed.Searched = reason(err), []string{abs}
			case linkErr == nil:
				failed.missing = fmt.Sprintf("%s is a symbolic link to %s, which does not exist", libdir, to)
			default:
				failed.missing = libdir + ": no such file or directory"
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
		for _, folder := range folders {
			failed.lookAround(folder)
		}
	}
	return Library{}, failed
}

// archive is the name of the file that VMware ships VDDK in.
var archive = regexp.MustCompile(`^VMware-vix-disklib.*\.(tar|tgz|tar\.gz)$`)

// lookAround notes what else is in a folder without a library: one under another
// name, or the archive that it comes in.
func (e *LibraryError) lookAround(folder string) {
	entries, err := os.ReadDir(folder)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		e.Unusable[folder] = "it can't be read: " + reason(err)
	}
	for _, entry := range entries {
		path := filepath.Join(folder, entry.Name())
		if _, known := e.Unusable[path]; known {
			continue
		}
		switch m := versioned.FindStringSubmatch(entry.Name()); {
		case m != nil && m[2] != "":
			link := libraryName + "." + m[1]
			e.Unusable[path] = fmt.Sprintf("it is there without %s, the symbolic link to it", link)
			e.hint = fmt.Sprintf("unpack VDDK again with tar, which keeps its symbolic links: the library needs all of them (of this one: ln -s %s %s), and name the folder with --libdir",
				entry.Name(), filepath.Join(folder, link))
		case m != nil:
			e.Unusable[path] = fmt.Sprintf("it is version %s, and versions %d to %d are looked for", m[1], oldestVersion, versions[0])
			e.hint = "name the file itself with --libdir to try it"
		case entry.Name() == libraryName:
			e.Unusable[path] = "its name has no version"
			e.hint = "name the file itself with --libdir, or unpack VDDK again with tar, which keeps its symbolic links"
		case archive.MatchString(entry.Name()):
			e.Unusable[path] = "it is the archive of VDDK, not unpacked"
			e.hint = "unpack the archive with tar, and name its folder vmware-vix-disklib-distrib with --libdir"
		}
	}
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
	// A link may lead from the distribution's lib64 to where the file is, or
	// from elsewhere into the distribution.
	l.Root = l.Dir
	for _, dir := range []string{l.Dir, filepath.Dir(path)} {
		if filepath.Base(dir) == "lib64" {
			l.Root = filepath.Dir(dir)
			break
		}
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
type Function = worker.Function

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
	list := worker.Functions()
	for i := range list {
		list[i].Present = exported[list[i].Name]
	}
	return list, nil
}

// ErrNoWorker says that there is nothing to load a library with.
var ErrNoWorker = errors.New("the library can't be loaded")

// TransportModes loads the library, in a worker process, and returns the
// transport modes that it offers, separated by colons; empty where it does not
// tell. Where there is no worker program the error is an ErrNoWorker.
func TransportModes(ctx context.Context, l Library) (string, error) {
	p, err := worker.Start(ctx, worker.Config{Library: l.Path, Root: l.Root, Dir: l.Dir, Version: l.Version, Slots: 1, SlotSize: 4096})
	if errors.As(err, new(*worker.ProgramError)) || err != nil && runtime.GOARCH != "amd64" {
		return "", fmt.Errorf("%w: %w", ErrNoWorker, err)
	}
	if err != nil {
		return "", err
	}
	defer p.Release()
	return p.TransportModes(), p.Close(ctx)
}

// Missing names the libraries that the library needs, itself or through others,
// and that are found neither in its folder nor where the system's loader looks.
// It is for explaining a library that does not load, not for refusing one: a
// loader may have places of its own.
func Missing(l Library) []string { return worker.MissingLibraries(l.Path, l.Dir) }

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
