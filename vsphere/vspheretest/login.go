package vspheretest

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"

	"github.com/vmware/govmomi/vim25/soap"
)

// loggedIn makes the stand-in library accept the cookie of a new session.
func (s *Server) loggedIn(answer *httptest.ResponseRecorder) {
	for _, c := range (&http.Response{Header: answer.Header()}).Cookies() {
		if c.Name == soap.SessionCookieName {
			s.allowCookie(c.Value)
		}
	}
}

// refuseEnded removes the cookie of a session that EndSessions has ended from a request. The simulator
// would not refuse it in each case: a call that runs while its session is ended brings the session
// back.
func (s *Server) refuseEnded(r *http.Request) {
	c, err := r.Cookie(soap.SessionCookieName)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended[strings.Trim(c.Value, `"`)] {
		r.Header.Del("Cookie")
	}
}

// allowCookie makes the stand-in library accept a cookie, and the user and password of the server,
// and no other login. It does so only with StrictLogin.
func (s *Server) allowCookie(cookie string) {
	if !s.options.StrictLogin || s.options.LibDir == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	path := filepath.Join(s.options.LibDir, "vddktest.conf")
	text, err := os.ReadFile(path)
	s.must(err)
	var lines []string
	for line := range strings.Lines(string(text)) {
		key, _, _ := strings.Cut(line, " ")
		if key != "cookie" && key != "user" && key != "password" {
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
	}
	lines = append(lines, "cookie "+cookie, "user "+s.User, "password "+s.Password, "")
	s.must(os.WriteFile(path+".vspheretest", []byte(strings.Join(lines, "\n")), 0o644))
	s.must(os.Rename(path+".vspheretest", path))
}
