package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/transfer/batch"
)

// kubernetesBatch holds the manifests in examples/kubernetes.
type kubernetesBatch struct {
	text      string
	configMap *kubeConfigMap
	claim     *kubeClaim
	job       *kubeJob
	report    *kubeJob
}

// decodeKubernetes decodes batch.yaml and report.yaml.
func decodeKubernetes(t *testing.T, text, report string) (*kubernetesBatch, error) {
	b := &kubernetesBatch{text: text}
	objects, err := manifests(t, text)
	if err != nil {
		return nil, fmt.Errorf("batch.yaml: %w", err)
	}
	for _, object := range objects {
		switch o := object.(type) {
		case *kubeConfigMap:
			b.configMap = o
		case *kubeClaim:
			b.claim = o
		case *kubeJob:
			b.job = o
		}
	}
	merge, err := manifests(t, report)
	if err != nil {
		return nil, fmt.Errorf("report.yaml: %w", err)
	}
	if len(merge) == 1 {
		b.report, _ = merge[0].(*kubeJob)
	}
	if len(objects) != 3 || b.configMap == nil || b.claim == nil || b.job == nil || b.report == nil {
		return nil, errors.New("want a ConfigMap, a PersistentVolumeClaim and a Job, and a Job in report.yaml")
	}
	return b, nil
}

func kubernetesTexts(t *testing.T) (text, report string) {
	t.Helper()
	for name, into := range map[string]*string{"batch.yaml": &text, "report.yaml": &report} {
		b, err := os.ReadFile(filepath.Join(examples, "kubernetes", name))
		if err != nil {
			t.Fatal(err)
		}
		*into = string(b)
	}
	return text, report
}

func readKubernetesBatch(t *testing.T) *kubernetesBatch {
	t.Helper()
	text, report := kubernetesTexts(t)
	b, err := decodeKubernetes(t, text, report)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// problems collects mistakes in the manifests.
type problems []string

func (p *problems) add(format string, args ...any) { *p = append(*p, fmt.Sprintf(format, args...)) }

// checkPod looks whether all that a pod names is there, and whether it has no
// privileges: kubernetes.io/docs/concepts/security/pod-security-standards,
// "Restricted", and a root that nobody writes to.
func (b *kubernetesBatch) checkPod(p *kubePodSpec, bad *problems) {
	yes := func(b *bool) bool { return b != nil && *b }
	no := func(b *bool) bool { return b != nil && !*b }
	unused := map[string]bool{}
	for _, v := range p.Volumes {
		if _, twice := unused[v.Name]; twice || !isDNSLabel(v.Name) {
			bad.add("volume %q: a second one of the name, or no name", v.Name)
		}
		unused[v.Name] = true
		switch {
		case v.ConfigMap != nil:
			if v.ConfigMap.Name != b.configMap.Name {
				bad.add("volume %s: there is no ConfigMap %s", v.Name, v.ConfigMap.Name)
			}
		case v.PersistentVolumeClaim != nil:
			if v.PersistentVolumeClaim.ClaimName != b.claim.Name {
				bad.add("volume %s: there is no claim %s", v.Name, v.PersistentVolumeClaim.ClaimName)
			}
		case v.Secret != nil:
			s := v.Secret
			if s.DefaultMode == nil || *s.DefaultMode != 0o400 {
				bad.add("volume %s: mode %v", v.Name, s.DefaultMode)
			}
			// It is not among the manifests, of course: how to make it is said.
			for _, item := range s.Items {
				if how := "kubectl create secret generic " + s.SecretName + " --from-file=" + item.Key + "\n"; !strings.Contains(b.text, how) {
					bad.add("volume %s: nothing says %s", v.Name, how)
				}
			}
		case v.EmptyDir != nil:
		default:
			bad.add("volume %s is of another kind", v.Name)
		}
	}
	pod := p.SecurityContext
	if p.HostNetwork || p.HostPID || p.HostIPC || !no(p.AutomountServiceAccountToken) || pod == nil || !yes(pod.RunAsNonRoot) ||
		pod.RunAsUser == nil || *pod.RunAsUser == 0 || pod.RunAsGroup == nil || *pod.RunAsGroup == 0 || pod.FSGroup == nil ||
		pod.SeccompProfile == nil || pod.SeccompProfile.Type != "RuntimeDefault" {
		bad.add("the pod has privileges: %+v", pod)
	}
	if p.RestartPolicy != "Never" || len(p.Containers) != 1 {
		bad.add("restart policy %s, %d containers", p.RestartPolicy, len(p.Containers))
	}
	for _, c := range slices.Concat(p.InitContainers, p.Containers) {
		s := c.SecurityContext
		if s == nil || !no(s.AllowPrivilegeEscalation) || !yes(s.ReadOnlyRootFilesystem) || s.Capabilities == nil ||
			!slices.Contains(s.Capabilities.Drop, "ALL") || len(s.Capabilities.Add) > 0 || yes(s.Privileged) ||
			s.RunAsUser != nil || s.RunAsNonRoot != nil || s.SeccompProfile != nil {
			bad.add("container %s has privileges: %+v", c.Name, s)
		}
		if c.Resources.Requests.CPU == 0 || c.Resources.Requests.Memory == 0 || c.Resources.Limits.Memory < c.Resources.Requests.Memory {
			bad.add("container %s: resources %+v", c.Name, c.Resources)
		}
		// A secret is a file: in the environment every child would have it.
		if len(c.EnvFrom) > 0 || slices.ContainsFunc(c.Env, func(v kubeEnvVar) bool { return v.ValueFrom != nil || strings.HasPrefix(v.Name, "VDDKCP_") }) {
			bad.add("container %s: environment %+v", c.Name, c.Env)
		}
		paths := map[string]bool{}
		for _, m := range c.VolumeMounts {
			if _, ok := unused[m.Name]; !ok {
				bad.add("container %s: there is no volume %s", c.Name, m.Name)
			}
			unused[m.Name] = false
			if paths[m.MountPath] || !filepath.IsAbs(m.MountPath) {
				bad.add("container %s: %q: two mounts, or no path", c.Name, m.MountPath)
			}
			paths[m.MountPath] = true
		}
	}
	for v, not := range unused {
		if not {
			bad.add("no container mounts volume %s", v)
		}
	}
}

// Kinds of volumes of a pod.
func isClaim(v *kubeVolume) bool     { return v.PersistentVolumeClaim != nil }
func isConfigMap(v *kubeVolume) bool { return v.ConfigMap != nil }
func isSecret(v *kubeVolume) bool    { return v.Secret != nil }
func isEmptyDir(v *kubeVolume) bool  { return v.EmptyDir != nil }

// mounted looks whether a pod's first container has path on a volume of a kind,
// and, where the volume is of files that are known, whether it is one of them.
func (b *kubernetesBatch) mounted(p *kubePodSpec, path string, kind func(*kubeVolume) bool, writable bool, bad *problems) {
	best, ok := "", false
	for _, m := range p.Containers[0].VolumeMounts {
		name, below := strings.CutPrefix(path, m.MountPath+"/")
		if !below || len(m.MountPath) < len(best) {
			continue
		}
		best, ok = m.MountPath, false
		for _, v := range p.Volumes {
			if v.Name != m.Name {
				continue
			}
			ok = kind(&v) && m.ReadOnly == !writable
			if v.ConfigMap != nil && b.configMap.Data[name] == "" ||
				v.Secret != nil && !slices.ContainsFunc(v.Secret.Items, func(k kubeKeyToPath) bool { return k.Path == name }) {
				ok = false
			}
		}
	}
	if !ok {
		bad.add("%s is not on a volume of its kind", path)
	}
}

// runLine parses the command line of a container that runs vddkcp run.
func runLine(c *kubeContainer) (*batchCommand, error) {
	words := containerCommand(c, nil)
	var line cli
	parser, err := newParser(&line, io.Discard, io.Discard, func(int) {})
	if err != nil {
		return nil, err
	}
	all := strings.Join(words, " ")
	if len(words) < 2 || words[0] != "/usr/local/bin/vddkcp" || words[1] != "run" {
		return nil, fmt.Errorf("command %s, want /usr/local/bin/vddkcp run", all)
	}
	if strings.Contains(all, "$(") {
		return nil, fmt.Errorf("command %s has a variable that nobody sets", all)
	}
	if _, err := parser.Parse(words[1:]); err != nil {
		return nil, fmt.Errorf("command %s: %w", all, err)
	}
	return &line.RunJobs, nil
}

// load reads the job file of the ConfigMap.
func (b *kubernetesBatch) load() (*batch.File, error) {
	parser, err := newJobParser(new(servers))
	if err != nil {
		return nil, err
	}
	spec, err := parser.spec()
	if err != nil {
		return nil, err
	}
	return batch.Load(strings.NewReader(b.configMap.Data["jobs.json"]), "jobs.json", "/etc/vddkcp", spec)
}

// check checks that the manifests are consistent.
func (b *kubernetesBatch) check() (bad problems) {
	b.checkPod(&b.job.Spec.Template.Spec, &bad)
	b.checkPod(&b.report.Spec.Template.Spec, &bad)
	if !slices.Contains(b.claim.Spec.AccessModes, "ReadWriteMany") {
		bad.add("claim: %v", b.claim.Spec.AccessModes)
	}
	file, err := b.load()
	if err != nil {
		bad.add("%v", err)
		return bad
	}
	for _, w := range file.Warnings {
		bad.add("jobs.json: %s", w)
	}
	spec := b.job.Spec
	if spec.Completions == nil || spec.Parallelism == nil || spec.BackoffLimitPerIndex == nil || *spec.BackoffLimitPerIndex < 1 || spec.BackoffLimit != nil ||
		spec.PodReplacementPolicy == nil || *spec.PodReplacementPolicy != "Failed" {
		bad.add("job: %+v", spec)
		return bad
	}
	if grace := spec.Template.Spec.TerminationGracePeriodSeconds; grace == nil || *grace < 60 {
		bad.add("a stop has no time for journals: terminationGracePeriodSeconds")
	}
	shards, together := int(*spec.Completions), int64(*spec.Parallelism)
	if limits := file.Limits; together*limits.NFCBuffer > batch.DefaultNFCBuffer || together*int64(limits.Connections) > batch.DefaultConnections || limits.PerHost == 0 {
		bad.add("limits %+v, of %d shards at once", limits, together)
	}
	first := pod(b.job, 0)
	for _, j := range file.Jobs {
		b.mounted(first, j.Target, isClaim, true, &bad)
		b.mounted(first, strings.TrimPrefix(j.Text("password"), "+"), isSecret, false, &bad)
		b.mounted(first, j.Text("libdir"), isEmptyDir, false, &bad)
		if j.Host == "" || j.Text("thumbprint") == "" {
			bad.add("job %s has no host or no thumbprint", j.Name)
		}
	}
	b.mounted(first, "/tmp/x", isEmptyDir, true, &bad)
	if init := first.InitContainers; len(init) != 1 || init[0].Command != nil || init[0].Args != nil || len(init[0].VolumeMounts) != 1 || init[0].VolumeMounts[0].MountPath != "/opt" {
		bad.add("init containers %+v, want one that mounts /opt and does what its image says", init)
	}

	jobs, used := 0, map[string]bool{}
	for index := range shards {
		p := pod(b.job, index)
		line, err := runLine(&p.Containers[0])
		if err != nil {
			bad.add("index %d: %v", index, err)
			continue
		}
		if want := fmt.Sprintf("%d/%d", index, shards); line.Shard != want || !line.Resume {
			bad.add("index %d runs shard %s, resume %v, want %s", index, line.Shard, line.Resume, want)
		}
		b.mounted(p, line.Jobs, isConfigMap, false, &bad)
		b.mounted(p, line.LogDir+"/x", isClaim, true, &bad)
		for _, path := range append([]string{line.State}, line.Report...) {
			b.mounted(p, path, isClaim, true, &bad)
			if used[path] {
				bad.add("index %d writes %s, which is another's", index, path)
			}
			used[path] = true
		}
		mine, err := line.selected(file)
		if err != nil {
			bad.add("index %d: %v", index, err)
		}
		jobs += len(mine)
	}
	if jobs != len(file.Jobs) {
		bad.add("%d jobs are in the shards, of %d", jobs, len(file.Jobs))
	}

	p := pod(b.report, 0)
	merge, err := runLine(&p.Containers[0])
	if err != nil {
		bad.add("report: %v", err)
		return bad
	}
	for _, path := range append([]string{merge.MergeReports + "/x"}, merge.Report...) {
		b.mounted(p, path, isClaim, true, &bad)
		if filepath.Ext(path) == ".json" && filepath.Dir(path) == merge.MergeReports {
			bad.add("%s would be merged into the next one", path)
		}
	}
	for path := range used {
		if strings.HasSuffix(path, ".report.json") && filepath.Dir(path) != merge.MergeReports {
			bad.add("%s is not where reports are merged from", path)
		}
	}
	if len(merge.Report) != 2 || b.report.Spec.BackoffLimit == nil || *b.report.Spec.BackoffLimit != 0 {
		bad.add("the merge: %+v", merge)
	}
	return bad
}
