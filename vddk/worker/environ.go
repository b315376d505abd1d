package worker

import (
	"os"
	"strings"
)

// environ is the environment of a worker: env (nil: this process's) without
// what may hold a secret, and with dir in front of the library path.
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
	// glibc's own last words ("free(): invalid pointer") go to the terminal
	// otherwise, in older versions.
	return append(list, "LIBC_FATAL_STDERR_=1")
}

// maySecret says whether a variable looks like one that holds a secret: ours,
// and by its name anybody's.
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
