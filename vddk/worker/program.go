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

// embedded has the worker program if make has built it. Without it, the folder has only a
// README, so that go build works without make.
//
//go:embed bin/*
var embedded embed.FS

// startProgram starts the worker program, with files as its file descriptors 0 to 4. The program
// is the one at path or, if path is "", the embedded one or else an installed one.
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
		tried = append(tried, errors.New("no worker program is embedded in this executable"))
	} else {
		p, err := startMemory(code, env, files)
		if err == nil || outOf(err) {
			return p, err
		}
		tried = append(tried, fmt.Errorf("the embedded worker program does not start: %w", err))
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

// installed returns the paths at which the worker program of an executable may be installed.
func installed(executable string) []string {
	dir := filepath.Dir(executable)
	return []string{filepath.Join(dir, ProgramName), filepath.Join(dir, "../libexec/vddkcp", ProgramName)}
}

// startMemory starts a program from memory, without a file. The error is EACCES if the sysctl
// vm.memfd_noexec forbids that.
func startMemory(code []byte, env []string, files []*os.File) (*os.Process, error) {
	// Newer kernels log a warning if MFD_EXEC is missing. Older ones refuse it.
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
		return nil, fmt.Errorf("cannot seal the memory of the program: %w", err)
	}
	// The file becomes descriptor programFD of the child, which executes it through /proc.
	// Descriptors below that number are those of files. The worker closes programFD.
	p, err := start(fmt.Sprintf("/proc/self/fd/%d", programFD), env, append(files[:len(files):len(files)], file))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound("/proc/self/fd")
	}
	return p, err
}

// errNoLinker explains fs.ErrNotExist at the start of a program that does exist.
var errNoLinker = errors.New("the dynamic linker of the program is missing: VDDK needs a system with glibc")

// notFound returns the reason why the kernel did not find a program whose path was below
// descriptors, which is /proc/self/fd.
func notFound(descriptors string) error {
	if _, err := os.Stat(descriptors); err != nil {
		return fmt.Errorf("/proc is not mounted, and the program is started through it: %w", err)
	}
	return errNoLinker
}

// startFile starts the program at path.
func startFile(path string, env []string, files []*os.File) (*os.Process, error) {
	p, err := start(path, env, files)
	if errors.Is(err, fs.ErrNotExist) {
		if _, statErr := os.Stat(path); statErr == nil {
			return nil, fmt.Errorf("%s: %w", path, errNoLinker)
		}
	}
	return p, err
}

// start starts a program with the given environment and file descriptors.
func start(path string, env []string, files []*os.File) (*os.Process, error) {
	return os.StartProcess(path, []string{ProgramName}, &os.ProcAttr{
		Env:   env,
		Files: files,
		// In a session of its own, the worker does not get the signal of Ctrl-C, since the
		// parent may still need it, and the library cannot ask for a password on the terminal.
		Sys: &unix.SysProcAttr{Setsid: true},
	})
}
