package worker

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ProgramName is the worker's file name, and its argv[0].
const ProgramName = "vddkcp-vddk-worker"

// The folder holds the program when make has built it, else a README only, so
// that a plain go build works.
//
//go:embed bin/*
var embedded embed.FS

// startProgram starts the worker with files as its descriptors 0 to 4: path,
// where there is one, else the embedded program, else an installed one.
func startProgram(path string, env []string, files []*os.File) (*os.Process, error) {
	if path != "" {
		p, err := startFile(path, env, files)
		if err != nil && !outOf(err) {
			return nil, &ProgramError{Tried: []error{err}}
		}
		return p, err
	}
	var tried []error
	if code, err := embedded.ReadFile("bin/" + ProgramName); err != nil {
		tried = append(tried, errors.New("not embedded in this executable"))
	} else {
		p, err := startMemory(code, env, files)
		if err == nil || outOf(err) {
			return p, err
		}
		tried = append(tried, fmt.Errorf("the embedded one: %w", err))
	}
	self, err := os.Executable()
	if err != nil {
		return nil, &ProgramError{Tried: append(tried, err)}
	}
	for _, path := range installed(self) {
		p, err := startFile(path, env, files)
		if err == nil || outOf(err) {
			return p, err
		}
		tried = append(tried, err)
	}
	return nil, &ProgramError{Tried: tried}
}

// installed lists where the worker of an executable may be.
func installed(executable string) []string {
	dir := filepath.Dir(executable)
	return []string{filepath.Join(dir, ProgramName), filepath.Join(dir, "../libexec/vddkcp", ProgramName)}
}

// startMemory starts a program that no file holds. Where vm.memfd_noexec
// forbids that, the error is EACCES.
func startMemory(code []byte, env []string, files []*os.File) (*os.Process, error) {
	// Without MFD_EXEC newer kernels log a warning; older ones don't know it.
	fd, err := unix.MemfdCreate(ProgramName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(ProgramName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), ProgramName)
	defer file.Close()
	if _, err := file.Write(code); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		return nil, fmt.Errorf("seal the program: %w", err)
	}
	// The number that the descriptor has in the child, which executes it: any
	// other could be taken there by one of files. The worker closes it.
	p, err := start(fmt.Sprintf("/proc/self/fd/%d", programFD), env, append(files[:len(files):len(files)], file))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound("/proc/self/fd")
	}
	return p, err
}

// errNoLinker is what "no such file" means of a program that is there.
var errNoLinker = errors.New("the dynamic linker that it names is missing: VDDK needs a system with glibc")

// notFound explains why a program that exists, and that was named by a path
// below descriptors (/proc/self/fd), is not found.
func notFound(descriptors string) error {
	if _, err := os.Stat(descriptors); err != nil {
		return fmt.Errorf("/proc is not mounted, and the program is started through it: %w", err)
	}
	return errNoLinker
}

func startFile(path string, env []string, files []*os.File) (*os.Process, error) {
	p, err := start(path, env, files)
	if errors.Is(err, fs.ErrNotExist) {
		if _, statErr := os.Stat(path); statErr == nil {
			return nil, fmt.Errorf("%s: %w", path, errNoLinker)
		}
	}
	return p, err
}

func start(path string, env []string, files []*os.File) (*os.Process, error) {
	return os.StartProcess(path, []string{ProgramName}, &os.ProcAttr{
		Env:   env,
		Files: files,
		// A session of its own: Ctrl-C is for the parent, which may still want
		// the worker, and nothing is to ask for a password on the terminal.
		Sys: &unix.SysProcAttr{Setsid: true},
	})
}
