// Parses Groovy files: the compiler's phases that need no classes of QuPath.
import org.codehaus.groovy.control.CompilationUnit
import org.codehaus.groovy.control.Phases

args.each { file ->
    def unit = new CompilationUnit()
    unit.addSource(new File(file))
    unit.compile(Phases.CONVERSION)
    println "${file}: parsed by Groovy ${GroovySystem.getVersion()}"
}
