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

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// LibDirs are the folders in which FindLibrary looks for the VDDK distribution by default, in this
// order. The distribution is the folder tree that contains the library.
var LibDirs = []string{
	"/usr/lib/vmware-vix-disklib",
	"/usr/lib64/vmware-vix-disklib",
	"/opt/vmware-vix-disklib-distrib",
	"/opt/openvddk",
}

// FindLibrary looks for libraries with these major versions, which are part of their file names.
// It looks for oldestVersion only if the distribution has none of the newer versions, because
// oldestVersion has no asynchronous calls.
var (
	versions      = []int{9, 8, 7, 6}
	oldestVersion = 5
)

// LibraryVersions returns the major versions of the libraries that can be used, in increasing
// order.
func LibraryVersions() []int {
	return slices.Sorted(slices.Values(append([]int{oldestVersion}, versions...)))
}

// WorkerSHA256 returns the SHA-256 of the worker program inside this executable, in hexadecimal.
// The result is "" if the executable has no worker program.
func WorkerSHA256() string { return worker.EmbeddedSHA256() }

const libraryName = "libvixDiskLib.so"

// LibraryError says that FindLibrary found no library that can be loaded.
type LibraryError struct {
	Searched []string          // folders or files that were searched, in order
	Unusable map[string]string // files that exist, and why they cannot be used
	missing  string            // why the folder that the user named does not exist; "" if it does
	hint     string            // hint for this case; "" means the general one
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

// Hint tells the user how to get a library.
func (e *LibraryError) Hint() string {
	if e.hint != "" {
		return e.hint
	}
	return "unpack the tar file of VMware's VDDK and name its folder with --libdir, or install OpenVDDK, which is free, in /opt/openvddk"
}

// FindLibrary returns the newest library in libdir, which is the root folder of the VDDK
// distribution, its folder lib64, or the file of the library itself. If libdir is "", it searches
// the folders LibDirs, and returns the newest library of the first folder that has one. In each
// folder, the subfolder lib64 is searched before the folder itself. A library of version 5 is
// returned only if neither the subfolder nor the folder has a newer one. Files that this machine
// cannot load are skipped. FindLibrary does not load the library. The error is a *LibraryError.
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
					// Unlike Stat, Lstat also finds a symbolic link whose target is missing.
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

// The regular expression archive matches the file names of the tar files that VMware distributes
// VDDK in.
var archive = regexp.MustCompile(`^VMware-vix-disklib.*\.(tar|tgz|tar\.gz)$`)

// lookAround is called for a folder without a usable library. It looks for an explanation, such as
// a library under another name or a tar file of VDDK that was not unpacked, and records the
// explanation in the field Unusable.
func (e *LibraryError) lookAround(folder string) {
	entries, err := os.ReadDir(folder)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
		e.Unusable[folder] = "cannot be read: " + reason(err)
	}
	for _, entry := range entries {
		path := filepath.Join(folder, entry.Name())
		if _, known := e.Unusable[path]; known {
			continue
		}
		switch m := versioned.FindStringSubmatch(entry.Name()); {
		case m != nil && m[2] != "":
			link := libraryName + "." + m[1]
			e.Unusable[path] = fmt.Sprintf("the symbolic link %s to it is missing", link)
			e.hint = fmt.Sprintf("unpack VDDK again with tar, which keeps its symbolic links, and name the folder with --libdir; ln -s %s %s creates the missing link, but the library needs its other links, too",
				entry.Name(), filepath.Join(folder, link))
		case m != nil:
			e.Unusable[path] = fmt.Sprintf("it is version %s, only versions %d to %d are searched for", m[1], oldestVersion, versions[0])
			e.hint = fmt.Sprintf("to try this version of the library all the same, name its file: --libdir %s", printable.Word(path))
		case entry.Name() == libraryName:
			e.Unusable[path] = "its name has no version"
			e.hint = fmt.Sprintf("name the file of the library (--libdir %s), or unpack VDDK again with tar, which keeps its symbolic links", printable.Word(path))
		case archive.MatchString(entry.Name()):
			e.Unusable[path] = "it is the archive of VDDK, which must be unpacked"
			e.hint = "unpack the archive with tar, and name its folder vmware-vix-disklib-distrib with --libdir"
		}
	}
}

// The function reason returns the text of err without the path of the file. The map
// LibraryError.Unusable has this text with the path as its key, and the message of the error shows
// both.
func reason(err error) string {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err.Error()
	}
	return err.Error()
}

// The function library examines the library file at the given absolute path and returns it as a
// Library. The error says why this machine cannot load the file.
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
	// The path may be a symbolic link in lib64 of the distribution to a file elsewhere, or a link
	// elsewhere to a file in lib64. In both cases l.Root, the root folder of the distribution, is
	// the parent folder of lib64.
	l.Root = l.Dir
	for _, dir := range []string{l.Dir, filepath.Dir(path)} {
		if filepath.Base(dir) == "lib64" {
			l.Root = filepath.Dir(dir)
			break
		}
	}
	// The version is part of the name of the file, and also of the SONAME, the name that the
	// library itself contains. The SONAME is more reliable.
	names := []string{filepath.Base(path), filepath.Base(real)}
	if soname, err := f.DynString(elf.DT_SONAME); err == nil {
		names = append(soname, names...)
	}
	for _, name := range names {
		if m := versioned.FindStringSubmatch(name); m != nil {
			l.Version, err = strconv.Atoi(m[1])
			if err != nil || l.Version < oldestVersion {
				return Library{}, fmt.Errorf("the library has version %s, expected %d or later", m[1], oldestVersion)
			}
			return l, nil
		}
	}
	return Library{}, fmt.Errorf("neither the name of the file nor its SONAME is %s.N, where N is the version", libraryName)
}

var versioned = regexp.MustCompile(`^libvixDiskLib\.so\.([0-9]+)(\.|$)`)

// openELF opens a file and checks that it is a shared library for x86-64, which a worker process
// can load.
func openELF(path string) (*elf.File, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() { // opening a FIFO would wait
		return nil, errors.New("not a regular file")
	}
	f, err := elf.Open(path)
	if err != nil {
		if errors.As(err, new(*os.PathError)) {
			return nil, err
		}
		return nil, fmt.Errorf("not an ELF file, or truncated (%w)", err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 || f.Type != elf.ET_DYN {
		f.Close()
		return nil, fmt.Errorf("the ELF file has the machine %s, the class %s and the type %s; expected a shared library for 64-bit x86-64", f.Machine, f.Class, f.Type)
	}
	return f, nil
}

// Function is a function of VDDK that a library may have or lack.
type Function = worker.Function

// Functions returns the functions of VDDK that this package can use. The field Function.Present is
// true for those that the library has. Functions reads the symbol table of the library and does not
// load it.
func Functions(l Library) ([]Function, error) {
	f, err := openELF(l.Path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.Path, err)
	}
	defer f.Close()
	symbols, err := f.DynamicSymbols()
	if err != nil && !errors.Is(err, elf.ErrNoSymbols) {
		return nil, fmt.Errorf("%s: cannot read the table of symbols: %w", l.Path, err)
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

// ErrNoWorker says that no worker program could be started. Only that program can load the library.
var ErrNoWorker = errors.New("the library cannot be loaded without a worker program")

// TransportModes loads the library in a worker process and returns the transport modes that it
// supports, separated by colons. The result is "" if the library does not list them. If no worker
// program can be started, the error wraps ErrNoWorker.
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

// Missing explains why the library l does not load: it returns the names of the libraries that l
// needs, directly or through other libraries, and that are not installed. It searches the folder
// of l and the usual folders of the system. The dynamic linker may search other folders, too.
// Therefore a library that Missing names may exist after all.
func Missing(l Library) []string { return worker.MissingLibraries(l.Path, l.Dir) }

// MissingError says that the VDDK library needs other libraries that are not installed.
type MissingError struct {
	Library string
	Names   []string // as Missing returns them
}

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s needs libraries that are not installed: %s", e.Library, strings.Join(e.Names, ", "))
}

// Hint tells the user what to do about the error.
func (e *MissingError) Hint() string {
	for _, name := range e.Names {
		if name == "libssl.so.3" || name == "libcrypto.so.3" {
			return "VDDK 8.0.2 and later need OpenSSL 3, which older systems do not have: use VDDK 8.0.1, or a newer system"
		}
	}
	return "unpack all of VDDK with its symbolic links, or install the packages that contain these libraries"
}
