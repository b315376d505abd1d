package worker

import (
	"os"
	"strings"
)

// The function environ returns the environment for a worker process. It takes env, or the
// environment of this process if env is nil. From that it removes the variables that may hold a
// secret, and puts the folder dir at the front of LD_LIBRARY_PATH.
func environ(env []string, dir string) []string {
	if env == nil {
		env = os.Environ()
	}
	var list []string
	libraries := dir
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		switch {
		case name == "LD_LIBRARY_PATH":
			if libraries == "" {
				libraries = value
			} else if value != "" {
				libraries += ":" + value
			}
		case !maySecret(name):
			list = append(list, e)
		}
	}
	if libraries != "" {
		list = append(list, "LD_LIBRARY_PATH="+libraries)
	}
	// LIBC_FATAL_STDERR_ makes older versions of glibc write their messages about a corrupted
	// heap to standard error, which this package reads, and not to the terminal.
	return append(list, "LIBC_FATAL_STDERR_=1")
}

// maySecret reports whether the environment variable with the given name may hold a secret. That is
// so if the name begins with VDDKCP_, or contains a word such as PASSWORD.
func maySecret(name string) bool {
	name = strings.ToUpper(name)
	if strings.HasPrefix(name, "VDDKCP_") {
		return true
	}
	for _, word := range []string{"PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "TOKEN", "COOKIE", "CREDENTIAL", "APIKEY", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY"} {
		if strings.Contains(name, word) {
			return true
		}
	}
	return false
}
